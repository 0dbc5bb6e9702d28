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

    async def share(self) -> Located:
        """How a receiver in another process finds the blocks. Raises StaleLease."""
        num_blocks = self.pool.num_blocks_for(self.lease.num_tokens)
        blocks = self.held.blocks[:num_blocks]
        return await self.storage.share(blocks, lambda: self.held.require("sending"))

    def release(self) -> None:
        """Free the blocks; nothing happens where they are free already."""
        if self.held.state == "sending":
            self.pool.advance(self.held, "acknowledge")


@dataclass(frozen=True, slots=True)
class PoolTarget:
    """The receiving side: a lease that a transfer owns until a sequence adopts it.

    `on_abort` tells the engine that nobody will adopt it.
    """

    pool: BlockPool
    storage: Storage
    held: Lease
    lease: LeaseRef
    on_abort: Callable[[], None]

    async def receive(self, source: KVSource) -> None:
        """Copy all blocks. Raises StaleLease; aborts its own lease where it does not succeed."""
        if not isinstance(source, PoolSource):
            raise TypeError(f"a pool receives from a pool of its process, not {type(source)}")
        await self._receive(lambda: self._copy(source))

    async def fetch(self, source: Located) -> None:
        """Copy all blocks from another process, which keeps them until it is told. Raises
        StaleLease, DamagedBlocks; aborts its own lease where it does not succeed.
        """
        await self._receive(lambda: self._fetch(source))

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

    async def _fetch(self, source: Located) -> None:
        def check() -> None:
            self.held.require("receiving")

        num_blocks = self.pool.num_blocks_for(self.held.num_tokens)
        if source.num_blocks != num_blocks:
            raise StaleLease(f"{source.num_blocks} blocks were sent for {num_blocks}")
        await self.storage.fetch(source, self.held.blocks[:num_blocks], check)
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
