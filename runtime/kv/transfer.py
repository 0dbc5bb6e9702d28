"""Both ends of a copy between two block pools, of one process or of two."""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from sagellm.runtime.engine.port import KVSource, StaleLease
from sagellm.runtime.kv.lease import Lease
from sagellm.runtime.kv.located import Located
from sagellm.runtime.kv.pool import BlockPool
from sagellm.runtime.kv.storage import Storage
from sagellm.runtime.messages import LeaseRef


@dataclass(frozen=True, slots=True)
class PoolSource:
    """The sending side: a lease in state `sending`."""

    pool: BlockPool
    storage: Storage
    held: Lease
    lease: LeaseRef

    async def share(self, first: int = 0) -> Located:
        """How a receiver in another process finds the blocks from `first` on. Raises StaleLease."""
        num_blocks = self.pool.num_blocks_for(self.lease.num_tokens)
        blocks = self.held.blocks[first:num_blocks]
        return await self.storage.share(blocks, lambda: self.held.require("sending"))

    def release(self) -> None:
        """Free the blocks; nothing happens where they are free already."""
        if self.held.state == "sending":
            self.pool.advance(self.held, "acknowledge")


@dataclass(slots=True, eq=False)
class PoolTarget:
    """The receiving side: a lease that a transfer owns until a sequence adopts it.

    `on_abort` tells the engine that nobody will adopt it. `num_landed`: of its blocks, those that
    came while the others were still being computed.
    """

    pool: BlockPool
    storage: Storage
    held: Lease
    lease: LeaseRef
    on_abort: Callable[[], None]
    num_landed: int = 0

    async def receive(self, source: KVSource) -> None:
        """Copy all blocks. Raises StaleLease; aborts its own lease where it does not succeed."""
        if not isinstance(source, PoolSource):
            raise TypeError(f"a pool receives from a pool of its process, not {type(source)}")
        await self._receive(lambda: self._copy(source))

    async def fetch(self, source: Located, first: int = 0) -> None:
        """Copy all blocks from `first` on from another process, which keeps them until it is told.
        Raises StaleLease, DamagedBlocks; aborts its own lease where it does not succeed.
        """
        await self._receive(lambda: self._fetch(source, first))

    async def fetch_part(self, source: Located, first: int) -> None:
        """Copy some blocks, of a prompt that is still being computed. Raises StaleLease,
        DamagedBlocks; then they have not landed, and the lease is as it was.
        """
        if first != self.num_landed:
            raise StaleLease(f"block {first} came where {self.num_landed} was due")
        end = first + source.num_blocks
        blocks = self.held.blocks[first:end]
        if len(blocks) != source.num_blocks:
            raise StaleLease(f"{source.num_blocks} blocks were sent for {len(blocks)}")
        await self.storage.fetch(source, blocks, lambda: self.held.require("reserved"))
        self.held.require("reserved")
        self.num_landed = end

    def abort(self) -> None:
        """Give the blocks back, unless a sequence has adopted them."""
        if self.held.owner == "transfer":
            self.pool.advance(self.held, "cancel")
            self.on_abort()

    async def _receive(self, copy: Callable[[], Awaitable[None]]) -> None:
        try:
            self.pool.advance(self.held, "receive")
            await copy()
            self.pool.advance(self.held, "arrive")
        except BaseException:
            self.abort()
            raise

    async def _fetch(self, source: Located, first: int) -> None:
        def check() -> None:
            self.held.require("receiving")

        blocks = self.held.blocks[first : self.pool.num_blocks_for(self.held.num_tokens)]
        if first > self.num_landed or source.num_blocks != len(blocks):
            raise StaleLease(
                f"{source.num_blocks} blocks from {first} on were sent for {len(blocks)}"
            )
        await self.storage.fetch(source, blocks, check)
        check()

    async def _copy(self, source: PoolSource) -> None:
        def check() -> None:
            source.held.require("sending")
            self.held.require("receiving")

        check()
        # Both may hold more blocks than the tokens need; the tokens count.
        num_blocks = self.pool.num_blocks_for(self.held.num_tokens)
        pairs = list(zip(source.held.blocks, self.held.blocks, strict=False))[:num_blocks]
        await self.storage.receive(source.storage, pairs, check)
        check()
