"""The block pool: reference-counted KV blocks, and the leases that hold them."""

from collections import Counter
from collections.abc import Callable, Iterator

from sagellm.runtime.engine.port import StaleLease
from sagellm.runtime.kv.lease import Fence, Lease, LeaseEvent, LeaseOwner
from sagellm.runtime.messages import LeaseRef


class PoolExhausted(RuntimeError):
    """Fewer blocks are free than were asked for; nothing was taken."""


class BlockPool:
    """Counts blocks, knows no storage. `num_blocks = num_free + num_cached + num_leased`, always.

    A block is leased while at least one live lease refers to it. `on_free` is called after blocks
    became free, so that whoever waits for some can be served.
    """

    def __init__(
        self, num_blocks: int, block_size: int, on_free: Callable[[], None] = lambda: None
    ) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.on_free = on_free
        self.num_cached = 0  # blocks that no lease holds, kept for reuse of a prefix
        self.num_leased = 0
        self.peak_leased = 0
        self._free = list(range(num_blocks - 1, -1, -1))  # a stack: the warmest block goes first
        self._references = [0] * num_blocks
        self._leases: dict[int, Lease] = {}
        self._families: dict[tuple[str, int], dict[int, Lease]] = {}
        self._next_id = 1

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def leases(self) -> Iterator[Lease]:
        return iter(self._leases.values())

    def num_blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def reserve(self, fence: Fence, num_tokens: int, owner: LeaseOwner = "sequence") -> Lease:
        """Lease enough blocks for `num_tokens`. Raises PoolExhausted."""
        return self._open(fence, self._take(self.num_blocks_for(num_tokens)), num_tokens, owner)

    def fork(self, parent: Lease, fence: Fence, num_shared: int, num_tokens: int) -> Lease:
        """Lease the first `num_shared` blocks of `parent` by reference, and new ones behind them.

        Shared blocks are full and never written again. Raises PoolExhausted, StaleLease.
        """
        parent.require("reserved", "filled", "sending")
        shared = parent.blocks[:num_shared]
        added = self._take(self.num_blocks_for(num_tokens) - num_shared)
        for block in shared:
            self._references[block] += 1
        return self._open(fence, shared + added, num_tokens, "sequence")

    def grow(self, lease: Lease, num_tokens: int) -> None:
        """Extend a lease so that it holds `num_tokens`. Raises PoolExhausted, StaleLease."""
        lease.require("reserved", "filled")
        lease.blocks += self._take(self.num_blocks_for(num_tokens) - len(lease.blocks))
        lease.capacity = len(lease.blocks) * self.block_size

    def advance(self, lease: Lease, event: LeaseEvent) -> None:
        """Apply one transition; a lease that becomes `released` gives its references back."""
        was_released = lease.state == "released"
        lease.state = lease.next_state(event)
        if lease.state == "released" and not was_released:
            self._close(lease)

    def find(self, ref: LeaseRef) -> Lease:
        """The live lease of that name. Raises StaleLease where it is gone or fenced off."""
        lease = self._leases.get(ref.lease_id)
        if lease is None:
            raise StaleLease(f"lease {ref.lease_id} of request {ref.request_id} is gone")
        if lease.fence != Fence(ref.request_id, ref.choice, ref.epoch):
            raise StaleLease(f"lease {ref.lease_id} belongs to {lease.fence}, not to {ref}")
        return lease

    def siblings(self, fence: Fence) -> list[Lease]:
        """Live leases of the other choices of the same request and epoch."""
        family = self._families.get((fence.request_id, fence.epoch))
        if family is None:
            return []
        return [lease for lease in family.values() if lease.fence.choice != fence.choice]

    def release_all(self, event: LeaseEvent = "crash") -> None:
        """End every live lease: the engine stops."""
        for lease in list(self._leases.values()):
            self.advance(lease, event)

    def check(self) -> None:
        """Assert the ledger: every block is free, cached or leased, and references add up."""
        counted = Counter(block for lease in self.leases for block in lease.blocks)
        assert self.num_blocks == self.num_free + self.num_cached + self.num_leased
        assert len(set(self._free)) == len(self._free)
        assert self.num_leased == len(counted)
        assert all(n == counted[block] for block, n in enumerate(self._references))
        assert not any(self._references[block] for block in self._free)

    def _open(self, fence: Fence, blocks: list[int], num_tokens: int, owner: LeaseOwner) -> Lease:
        capacity = len(blocks) * self.block_size
        lease = Lease(self._next_id, fence, owner, blocks, num_tokens, capacity)
        self._next_id += 1
        self._leases[lease.lease_id] = lease
        family = self._families.setdefault((fence.request_id, fence.epoch), {})
        family[lease.lease_id] = lease
        return lease

    def _close(self, lease: Lease) -> None:
        del self._leases[lease.lease_id]
        key = lease.fence.request_id, lease.fence.epoch
        del self._families[key][lease.lease_id]
        if not self._families[key]:
            del self._families[key]
        self._give(lease.blocks)
        lease.blocks = []

    def _take(self, count: int) -> list[int]:
        if count > len(self._free):
            raise PoolExhausted(
                f"{count} blocks wanted, {len(self._free)} of {self.num_blocks} free"
            )
        if count <= 0:
            return []
        taken = self._free[-count:]
        del self._free[-count:]
        for block in taken:
            self._references[block] = 1
        self.num_leased += count
        self.peak_leased = max(self.peak_leased, self.num_leased)
        return taken

    def _give(self, blocks: list[int]) -> None:
        num_free = len(self._free)
        for block in blocks:
            self._references[block] -= 1
            if not self._references[block]:
                self._free.append(block)
        self.num_leased -= len(self._free) - num_free
        if len(self._free) > num_free:
            self.on_free()
