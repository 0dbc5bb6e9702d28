"""The block pool: reference-counted KV blocks, and the leases that hold them."""

from collections import Counter
from collections.abc import Callable, Iterator
from collections.abc import Sequence as Items

from sagellm.runtime.kv.block_key import BlockKey
from sagellm.runtime.kv.cache_log import CacheLog
from sagellm.runtime.kv.lease import Fence, Lease, LeaseEvent, LeaseOwner
from sagellm.runtime.kv.prefix_tree import Node, PrefixTree
from sagellm.runtime.messages import NORMAL, LeaseRef
from sagellm.runtime.port import StaleLease


class PoolExhausted(RuntimeError):
    """Fewer blocks are available than were asked for; nothing was taken."""


class BlockPool:
    """Counts blocks, knows no storage. `num_blocks = num_free + num_cached + num_leased`, always.

    A block is leased while at least one live lease refers to it. One that was published is cached
    afterwards, until blocks run out; not where `keeps_prefixes` is False: then only leases that
    live at the same time share blocks. `on_free` is called after blocks became available, so that
    whoever waits for some can be served.
    """

    def __init__(
        self,
        num_blocks: int,
        block_size: int,
        on_free: Callable[[], None] = lambda: None,
        *,
        keeps_prefixes: bool = True,
    ) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.on_free = on_free
        self.keeps_prefixes = keeps_prefixes
        self.num_leased = 0
        self.peak_leased = 0
        self._free = list(range(num_blocks - 1, -1, -1))  # a stack: the warmest block goes first
        self._references = [0] * num_blocks
        self._leases: dict[int, Lease] = {}
        self._tree = PrefixTree(num_blocks)
        self._next_id = 1

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_cached(self) -> int:
        """Blocks that no lease refers to, kept because their prefix may be met again."""
        return self._tree.num_idle

    @property
    def num_available(self) -> int:
        """Blocks that can be leased: cached ones are evicted for it."""
        return len(self._free) + self._tree.num_idle

    @property
    def num_evicted(self) -> int:
        return self._tree.num_evicted

    @property
    def leases(self) -> Iterator[Lease]:
        return iter(self._leases.values())

    def open_log(self) -> CacheLog:
        """A log of the prefixes that are kept, from now on. The one before gets no more."""
        if not self.keeps_prefixes:  # what leases share now is of no use to others
            return CacheLog(lambda: ())
        log = self._tree.log = CacheLog(lambda: self._tree.hashes)
        return log

    def num_blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def num_wanted(self, num_tokens: int, prefix: Items[Node] = ()) -> int:
        """How many available blocks a reservation would take."""
        num_idle = sum(not self._references[node.block] for node in prefix)
        return self.num_blocks_for(num_tokens) - len(prefix) + num_idle

    def reserve(
        self,
        fence: Fence,
        num_tokens: int,
        owner: LeaseOwner = "sequence",
        *,
        prefix: Items[Node] = (),
        priority: int = NORMAL,
    ) -> Lease:
        """Lease the blocks of `prefix` by reference and, behind them, new ones for `num_tokens`.

        `prefix` is a live path from the tree's root; its blocks are full and never written again.
        Raises PoolExhausted.
        """
        self._require(self.num_wanted(num_tokens, prefix))
        for node in prefix:
            self._refer(node, priority)
        blocks = [node.block for node in prefix]
        blocks += self._take(self.num_blocks_for(num_tokens) - len(blocks))
        lease = Lease(
            self._next_id, fence, owner, blocks, num_tokens, len(blocks) * self.block_size
        )
        lease.path += prefix
        self._next_id += 1
        self._leases[lease.lease_id] = lease
        self.peak_leased = max(self.peak_leased, self.num_leased)
        return lease

    def child(self, parent: Node | None, key: BlockKey) -> Node | None:
        """The published block of that key behind a live `parent`."""
        return self._tree.child(parent, key)

    def publish(
        self,
        lease: Lease,
        keys: Items[BlockKey],
        priority: int = NORMAL,
        *,
        may_swap: bool = True,
    ) -> bool:
        """Let others find the next full blocks of `lease`, whose keys and values are computed.

        Where the same was published before, the lease refers to that block from now on, and its
        own becomes free: nothing may be reading, writing or copying them now. Where that may be
        (not `may_swap`) it stops there; False tells so. Raises StaleLease.
        """
        lease.require("reserved", "filled")
        doubles = []
        for key in keys:
            index = len(lease.path)
            block, parent = lease.blocks[index], lease.path[-1] if lease.path else None
            node = self._tree.insert(parent, key, block, priority)
            if node is None:
                break
            if node.block != block:
                if not may_swap:
                    return False
                self._refer(node, priority)
                lease.blocks[index] = node.block
                doubles.append(block)
            lease.path.append(node)
        self._give(doubles)
        return True

    def grow(self, lease: Lease, num_tokens: int) -> None:
        """Extend a lease so that it holds `num_tokens`. Raises PoolExhausted, StaleLease."""
        lease.require("reserved", "filled")
        num_new = self.num_blocks_for(num_tokens) - len(lease.blocks)
        self._require(num_new)
        lease.blocks += self._take(num_new)
        lease.capacity = len(lease.blocks) * self.block_size
        self.peak_leased = max(self.peak_leased, self.num_leased)

    def advance(self, lease: Lease, event: LeaseEvent) -> None:
        """Apply one transition; a lease that becomes `released` gives its references back.

        After a crash nobody finds what it published, or built on: it may be why it crashed.
        """
        was_released = lease.state == "released"
        lease.state = lease.next_state(event)
        if lease.state == "released" and not was_released:
            if event == "crash" and lease.path:
                self._free += self._tree.drop(lease.path[0])
            self._close(lease)

    def find(self, ref: LeaseRef) -> Lease:
        """The live lease of that name. Raises StaleLease where it is gone or fenced off."""
        lease = self._leases.get(ref.lease_id)
        if lease is None:
            raise StaleLease(f"lease {ref.lease_id} of request {ref.request_id} is gone")
        if lease.fence != Fence(ref.request_id, ref.choice, ref.epoch):
            raise StaleLease(f"lease {ref.lease_id} belongs to {lease.fence}, not to {ref}")
        return lease

    def release_all(self, event: LeaseEvent = "crash") -> None:
        """End every live lease, and forget every prefix: the engine stops."""
        for lease in list(self._leases.values()):
            self.advance(lease, event)
        self._free += self._tree.drop_all()

    def check(self) -> None:
        """Assert the ledger: every block is free, cached or leased, and references add up."""
        counted = Counter(block for lease in self.leases for block in lease.blocks)
        cached = {node.block for node in self._tree.idle}
        assert self.num_blocks == self.num_free + self.num_cached + self.num_leased
        assert len({*self._free, *cached, *counted}) == self.num_blocks
        assert self.num_leased == len(counted)
        assert all(n == counted[block] for block, n in enumerate(self._references))
        for lease in self.leases:
            assert [node.block for node in lease.path] == lease.blocks[: len(lease.path)]
        self._tree.check(self._references)

    def _close(self, lease: Lease) -> None:
        del self._leases[lease.lease_id]
        self._give(lease.blocks)
        lease.blocks, lease.path = [], []

    def _require(self, count: int) -> None:
        if count > self.num_available:
            raise PoolExhausted(
                f"{count} blocks wanted, {self.num_available} of {self.num_blocks} available"
            )

    def _refer(self, node: Node, priority: int) -> None:
        is_idle = not self._references[node.block]
        self._tree.use(node, priority, is_idle=is_idle)
        self._references[node.block] += 1
        self.num_leased += is_idle

    def _take(self, count: int) -> list[int]:
        """So many blocks that hold nothing; there are enough."""
        if count <= 0:
            return []
        while len(self._free) < count:
            self._free.append(self._tree.evict())
        taken = self._free[: -count - 1 : -1]  # in the order of memory, where they are fresh
        del self._free[-count:]
        for block in taken:
            self._references[block] = 1
        self._tree.note_handed_out(count)
        self.num_leased += count
        return taken

    def _give(self, blocks: list[int]) -> None:
        num_given = 0
        for block in reversed(blocks):  # the deepest first: the prefix tree relies on it
            self._references[block] -= 1
            if not self._references[block]:
                num_given += 1
                if not self._tree.retire(block, keep=self.keeps_prefixes):
                    self._free.append(block)
        self.num_leased -= num_given
        if num_given:
            self.on_free()
