"""Both ends of a copy between two block pools, of one process or of two."""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from sagellm.runtime.kv.lease import Lease, LeaseState
from sagellm.runtime.kv.located import Located
from sagellm.runtime.kv.part import Part
from sagellm.runtime.kv.pool import BlockPool
from sagellm.runtime.kv.storage import Storage
from sagellm.runtime.messages import LeaseRef
from sagellm.runtime.port import KVSource, StaleLease


@dataclass(frozen=True, slots=True)
class PoolSource:
    """The sending side: a lease in state `sending`."""

    pool: BlockPool
    storage: Storage
    held: Lease
    lease: LeaseRef

    async def share(self, num_landed: int = 0) -> Located:
        """How a receiver in another process finds the blocks after those that have landed there.
        Raises StaleLease.
        """
        _check_rest(self.pool.num_blocks_for(self.lease.num_tokens), num_landed)
        blocks = self.pool.sent(self.held, num_landed)
        return await self.storage.share(blocks, lambda: self.held.require("sending"))

    def release(self) -> None:
        """Free the blocks; nothing happens where they are free already."""
        if self.held.state == "sending":
            self.pool.advance(self.held, "acknowledge")


@dataclass(slots=True, eq=False)
class PoolTarget:
    """The receiving side: a lease that a transfer owns until a sequence adopts it.

    `on_abort` tells the engine that nobody will adopt it. `num_landed` blocks came while the rest
    was still being computed.
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

    async def fetch(self, source: Located, num_landed: int = 0) -> None:
        """Copy all but what has landed from another process, which keeps it until it is told.
        Raises StaleLease, DamagedBlocks; aborts its own lease where it does not succeed.
        """
        await self._receive(lambda: self._fetch(source, num_landed))

    async def fetch_part(self, source: Located, part: Part) -> None:
        """Copy a part of a prompt that is still being computed. Raises StaleLease, DamagedBlocks;
        then it has not landed, and the lease is as it was.
        """
        self._check_follows(part.first)
        blocks = self.pool.full_blocks(self.held, part.first, part.end)
        if len(blocks) < part.num_blocks:
            raise StaleLease(f"lease {self.lease.lease_id} has no room for {part}")
        await self._copy_blocks(source, blocks, "reserved")
        self.num_landed = max(self.num_landed, part.end)

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

    async def _fetch(self, source: Located, num_landed: int) -> None:
        _check_rest(self.pool.num_blocks_for(self.held.num_tokens), num_landed)
        self._check_follows(num_landed)
        blocks = self.pool.sent(self.held, num_landed)
        await self._copy_blocks(source, blocks, "receiving")

    def _check_follows(self, first: int) -> None:
        if first > self.num_landed:
            raise StaleLease(f"block {first} came where {self.num_landed} blocks are there")

    async def _copy_blocks(self, source: Located, blocks: list[int], state: LeaseState) -> None:
        """A sender that names other blocks than these keeps another kind of memory: one without a
        recurrent state, say.
        """

        def check() -> None:
            self.held.require(state)

        if source.num_blocks != len(blocks):
            raise StaleLease(f"{source.num_blocks} blocks were sent where {len(blocks)} are due")
        await self.storage.fetch(source, blocks, check)
        check()

    async def _copy(self, source: PoolSource) -> None:
        def check() -> None:
            source.held.require("sending")
            self.held.require("receiving")

        check()
        sent, due = source.pool.sent(source.held), self.pool.sent(self.held)
        if len(sent) != len(due):
            raise StaleLease(f"{len(sent)} blocks were sent where {len(due)} are due")
        pairs = list(zip(sent, due, strict=True))
        await self.storage.receive(source.storage, pairs, check)
        check()


def _check_rest(num_blocks: int, num_landed: int) -> None:
    """That something of so many blocks has not landed: the last step's have not, always."""
    if num_landed >= num_blocks:
        raise StaleLease(f"{num_landed} of {num_blocks} blocks would have landed")
