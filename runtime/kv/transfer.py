"""Transfers between two block pools, of one process or of two, and the leases that they own."""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from sagellm.runtime.kv.lease import Fence, Lease, LeaseState
from sagellm.runtime.kv.pool import BlockPool
from sagellm.runtime.kv.transport import BlockLocation, KVChunk, Storage
from sagellm.runtime.messages import LeaseRef
from sagellm.runtime.port import KVSource, StaleLease


@dataclass(frozen=True, slots=True)
class PoolSource:
    """The sending side of a transfer: a lease in state `sending`."""

    pool: BlockPool
    storage: Storage
    held: Lease
    lease: LeaseRef

    async def share(self, num_received: int = 0) -> BlockLocation:
        """Offer the lease to a receiver in another process, without the first `num_received`
        blocks, which the receiver has already. Raises StaleLease.
        """
        _check_rest(self.pool.num_blocks_for(self.lease.num_tokens), num_received)
        blocks = self.pool.sent(self.held, num_received)
        return await self.storage.share(blocks, lambda: self.held.require("sending"))

    def release(self) -> None:
        """Free the blocks. May be called more than once."""
        if self.held.state == "sending":
            self.pool.advance(self.held, "acknowledge")


@dataclass(slots=True, eq=False)
class PoolTarget:
    """The receiving side of a transfer, which owns a lease until a sequence adopts the lease.

    `on_abort` is called if no sequence will adopt the lease. `num_received` counts the blocks that
    arrived while the prompt was still being computed.
    """

    pool: BlockPool
    storage: Storage
    held: Lease
    lease: LeaseRef
    on_abort: Callable[[], None]
    num_received: int = 0

    async def receive(self, source: KVSource) -> None:
        """Copy all blocks inside this process. Raises StaleLease. Aborts the target on any
        error.
        """
        if not isinstance(source, PoolSource):
            raise TypeError(f"a pool receives from a pool of its process, not {type(source)}")
        await self._receive(lambda: self._copy(source))

    async def fetch(self, source: BlockLocation, num_received: int = 0) -> None:
        """Copy the blocks after the first `num_received` from another process, which keeps them
        until the graph releases them. Raises StaleLease, DamagedBlocks. Aborts the target on any
        error.
        """
        await self._receive(lambda: self._fetch(source, num_received))

    async def fetch_chunk(self, source: BlockLocation, chunk: KVChunk) -> None:
        """Copy some blocks of a prompt that is still being computed. Raises StaleLease,
        DamagedBlocks. After an error the lease is unchanged, and the blocks do not count as
        received.
        """
        self._check_follows(chunk.first)
        blocks = self.pool.full_blocks(self.held, chunk.first, chunk.end)
        if len(blocks) < chunk.num_blocks:
            raise StaleLease(f"lease {self.lease.lease_id} has no room for {chunk}")
        await self._copy_blocks(source, blocks, "reserved")
        self.num_received = max(self.num_received, chunk.end)

    def abort(self) -> None:
        """Free the blocks, unless a sequence has adopted the lease."""
        if self.held.owner == "transfer":
            self.pool.advance(self.held, "cancel")
            self.on_abort()

    async def _receive(self, copy: Callable[[], Awaitable[None]]) -> None:
        try:
            self.pool.advance(self.held, "receive")
            await copy()
            self.pool.advance(self.held, "arrive")
        except BaseException:  # a cancellation too: no sequence may adopt a half-filled lease
            self.abort()
            raise

    async def _fetch(self, source: BlockLocation, num_received: int) -> None:
        _check_rest(self.pool.num_blocks_for(self.held.num_tokens), num_received)
        self._check_follows(num_received)
        blocks = self.pool.sent(self.held, num_received)
        await self._copy_blocks(source, blocks, "receiving")

    def _check_follows(self, first: int) -> None:
        # `num_received` counts blocks from the first on, so chunks must come in order.
        if first > self.num_received:
            raise StaleLease(f"block {first} came where {self.num_received} blocks are there")

    async def _copy_blocks(
        self, source: BlockLocation, blocks: list[int], state: LeaseState
    ) -> None:
        """Fetch into `blocks` while the lease is in `state`.

        Raises StaleLease if the sender offers another number of blocks: such a sender has other KV
        groups, for example no recurrent state, and its blocks would give wrong tokens.
        """

        def check() -> None:
            self.held.require(state)

        if source.num_blocks != len(blocks):
            raise StaleLease(f"{source.num_blocks} blocks were sent where {len(blocks)} are due")
        await self.storage.fetch(source, blocks, check)
        check()  # the lease may have ended after the last chunk

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


def _check_rest(num_blocks: int, num_received: int) -> None:
    """Raise StaleLease if no block is left to copy. Prefetches never copy the blocks of the last
    step.
    """
    if num_received >= num_blocks:
        raise StaleLease(f"{num_received} of {num_blocks} blocks are received already")


class PoolTransfers:
    """The leases that transfers of one pool own: computed prompts that wait for an export, and
    blocks reserved for imports.

    A fence has at most one held lease and one target.
    """

    def __init__(self, pool: BlockPool, storage: Storage, *, engine: str, replica: int) -> None:
        self._pool = pool
        self._storage = storage
        self._engine = engine
        self._replica = replica
        self._held: dict[Fence, Lease] = {}
        self._targets: dict[Fence, PoolTarget] = {}

    def hold(self, lease: Lease, num_tokens: int) -> LeaseRef:
        """Hold the blocks of a computed prompt until an export, an adoption or a cancel. Return the
        reference of the lease.
        """
        lease.num_tokens = num_tokens
        if lease.state == "reserved":  # a lease that was adopted before is filled already
            self._pool.advance(lease, "fill")
        self._held[lease.fence] = lease
        return lease.ref(self._engine, self._replica)

    def export(self, ref: LeaseRef) -> PoolSource:
        """Begin to send a held lease. Raises StaleLease."""
        lease = self._pool.find(ref)
        if self._held.get(lease.fence) is not lease:
            raise StaleLease(f"lease {ref.lease_id} is not held for an export")
        self._pool.advance(lease, "send")
        del self._held[lease.fence]
        return PoolSource(self._pool, self._storage, lease, ref)

    async def share_chunk(self, ref: LeaseRef, chunk: KVChunk) -> BlockLocation:
        """Offer computed blocks of full attention of a prompt that is still being computed.

        The blocks stay with the sequence. The offer ends with the lease, or when publishing swaps
        the blocks for equal ones. Raises StaleLease.
        """
        lease = self._pool.find(ref)
        blocks = self._pool.full_blocks(lease, chunk.first, chunk.end)

        def check() -> None:
            lease.require("reserved", "filled", "sending")
            if self._pool.full_blocks(lease, chunk.first, chunk.end) != blocks:
                raise StaleLease(f"lease {ref.lease_id} has other blocks by now")

        return await self._storage.share(blocks, check)

    def target(self, fence: Fence) -> PoolTarget | None:
        """The open receiving side of `fence`: not adopted, and not aborted. None if there
        is none.
        """
        return self._targets.get(fence)

    def target_of(self, ref: LeaseRef) -> PoolTarget:
        """The receiving side of exactly this lease. Raises StaleLease."""
        target = self._targets.get(Fence(ref.request_id, ref.choice, ref.epoch))
        if target is None or target.lease != ref:
            raise StaleLease(f"lease {ref.lease_id} of request {ref.request_id} is gone")
        return target

    def open_target(self, lease: Lease) -> PoolTarget:
        """Open the receiving side of a reserved lease."""

        def forget() -> None:
            self._targets.pop(lease.fence, None)

        ref = lease.ref(self._engine, self._replica)
        target = PoolTarget(self._pool, self._storage, lease, ref, forget)
        self._targets[lease.fence] = target
        return target

    def adopt(self, ref: LeaseRef, fence: Fence) -> Lease:
        """Make a sequence the owner of a filled lease, which was held or received in this pool.

        Raises StaleLease.
        """
        lease = self._pool.find(ref)
        lease.require("filled")
        if lease.fence != fence:
            raise StaleLease(f"lease {ref.lease_id} is of {lease.fence}, not of {fence}")
        held, target = self._held.get(fence), self._targets.get(fence)
        if held is lease:
            del self._held[fence]
        elif target is not None and target.held is lease:
            del self._targets[fence]
        else:
            raise StaleLease(f"lease {ref.lease_id} has an owner already")
        lease.owner = "sequence"
        return lease

    def cancel(self, fence: Fence) -> None:
        """Free the blocks that are held or reserved for `fence`."""
        if fence in self._held:
            self._pool.advance(self._held.pop(fence), "cancel")
        if fence in self._targets:
            self._targets[fence].abort()

    def clear(self) -> None:
        """Drop all records; the caller ends the leases in the pool."""
        self._held.clear()
        self._targets.clear()
