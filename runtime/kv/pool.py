"""The block pool: reference-counted KV blocks, and the leases that hold them."""

from collections import Counter
from collections.abc import Callable, Iterator
from collections.abc import Sequence as Items

from sagellm.runtime.kv.block_allocator import BlockAllocator
from sagellm.runtime.kv.cache_log import CacheLog
from sagellm.runtime.kv.lease import FREED, Fence, Lease, LeaseEvent, LeaseOwner, TableLayout
from sagellm.runtime.kv.prefix_tree import BlockKey, PrefixNode, PrefixTree
from sagellm.runtime.lease_shape import LeaseShape
from sagellm.runtime.messages import NORMAL, LeaseRef
from sagellm.runtime.port import StaleLease

_UNBOUNDED = 1 << 62  # tokens that a lease without block tables can hold


class BlockPool:
    """Leases blocks by number, and holds no memory. `num_blocks = num_free + num_cached +
    num_leased`, always.

    The blocks serve all KV groups of a model. `shape` determines how many blocks a lease takes for
    its tokens, and which blocks it frees before its end. A block is leased while at least one live
    lease refers to it. After that, a published block is cached until blocks run out. If
    `keeps_prefixes` is False nothing is cached: only leases that live at the same time share
    blocks. `on_free` is called after blocks became available, so that waiting sequences can be
    scheduled.
    """

    def __init__(
        self,
        num_blocks: int,
        block_size: int,
        on_free: Callable[[], None] = lambda: None,
        *,
        keeps_prefixes: bool = True,
        shape: LeaseShape | None = None,
    ) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.on_free = on_free
        self.keeps_prefixes = keeps_prefixes
        self.shape = shape = shape or LeaseShape(block_size)
        self.forgets = shape.forgets  # whether `free_unread` ever frees a block
        self.peak_leased = 0
        self._leases: dict[int, Lease] = {}
        self._num_tables = sum(group.num_tables for group in shape.groups)
        self._layout = TableLayout(shape)
        self._state_group = len(shape.groups)  # in `PrefixNode.entries`: after token groups
        num_groups = len(shape.groups) + (shape.num_state_blocks > 0)
        self._tree = PrefixTree(num_blocks, num_groups, is_anchored=shape.has_full)
        self._blocks = BlockAllocator(num_blocks, self._tree, keeps_prefixes=keeps_prefixes)
        self._next_id = 1

    @property
    def num_free(self) -> int:
        return self._blocks.num_free

    @property
    def num_cached(self) -> int:
        """Blocks that no lease refers to, kept because a later prompt may share their prefix."""
        return self._tree.num_idle

    @property
    def num_available(self) -> int:
        """Blocks that can be leased: free blocks, and cached blocks, which a lease evicts."""
        return self._blocks.num_available

    @property
    def num_leased(self) -> int:
        """Blocks that at least one live lease refers to."""
        return self._blocks.num_leased

    @property
    def num_evicted(self) -> int:
        return self._tree.num_evicted

    @property
    def leases(self) -> Iterator[Lease]:
        return iter(self._leases.values())

    def open_log(self) -> CacheLog:
        """Open a log of the cached prefixes. The pool writes only to the log that was opened last.

        The log stays empty if the pool frees blocks of windows or states early (`forgets`): a
        sequence cannot reuse every cached block of such a model, and a hash does not tell which
        blocks it can.
        """
        # Without kept prefixes only live leases share blocks, and routers cannot use these.
        if not self.keeps_prefixes or self.forgets:
            return CacheLog(lambda: ())
        log = self._tree.log = CacheLog(lambda: self._tree.hashes)
        return log

    def num_blocks_for(self, num_tokens: int) -> int:
        """Blocks that `num_tokens` take in one block table without a window."""
        return -(-num_tokens // self.block_size)

    def num_blocks_needed(
        self, num_tokens: int, prefix: Items[PrefixNode] = (), *, start: int | None = None
    ) -> int:
        """The number of available blocks that `reserve` would take."""
        start = len(prefix) * self.block_size if start is None else start
        total = self.shape.num_state_blocks
        for group, span, shared in self._layout.shares(num_tokens, prefix, start):
            # Idle shared blocks count too: once referred to, they are not available any more.
            total += group * (span - len(shared)) + self._blocks.num_idle(shared)
        return total + self._blocks.num_idle(self._layout.states(prefix))

    def reserve(
        self,
        fence: Fence,
        num_tokens: int,
        owner: LeaseOwner = "sequence",
        *,
        prefix: Items[PrefixNode] = (),
        priority: int = NORMAL,
        start: int | None = None,
    ) -> Lease:
        """Lease the blocks of `prefix` by reference and, after them, new blocks up to `num_tokens`.

        `prefix` is a live path from the tree's root, whose length `num_reusable` gave. Its blocks
        are full, and never written again. Steps compute the tokens after the prefix, or from
        `start` on if a transfer fills the blocks before `start`. Raises PoolExhausted.
        """
        start = len(prefix) * self.block_size if start is None else start
        self._blocks.require(self.num_blocks_needed(num_tokens, prefix, start=start))
        spans = self.shape.spans(num_tokens, start)
        shares = [shared for _, _, shared in self._layout.shares(num_tokens, prefix, start)]
        states = self._layout.states(prefix)
        # Before `take`, which may evict idle blocks.
        for entry in (entry for shared in (*shares, states) for entry in shared):
            self._blocks.refer(entry, priority)
        lease = Lease(self._next_id, fence, owner, [], num_tokens, 0)
        for group, (first, end), shared in zip(self.shape.groups, spans, shares, strict=True):
            for table in range(group.num_tables):
                held = [FREED] * first + [entry.blocks[table] for entry in shared]
                lease.tables.append(held + self._blocks.take(end - len(held)))
        lease.state_blocks = self._blocks.take(self.shape.num_state_blocks)
        lease.snapshots = [(start, list(entry.blocks)) for entry in states]
        lease.path += prefix
        self._note_capacity(lease)
        self._next_id += 1
        self._leases[lease.lease_id] = lease
        return lease

    def child(self, parent: PrefixNode | None, key: BlockKey) -> PrefixNode | None:
        """The published node of `key` after a live `parent`, or None."""
        return self._tree.child(parent, key)

    def num_reusable(self, path: Items[PrefixNode]) -> int:
        """The number of leading nodes of a live path that a sequence can reuse."""
        return self._layout.num_reusable(path)

    def publish(
        self,
        lease: Lease,
        keys: Items[BlockKey],
        priority: int = NORMAL,
        *,
        may_swap: bool = True,
    ) -> bool:
        """Publish the next full blocks of `lease`, whose keys and values are computed.

        If an equal block is published already, the lease is swapped to that block, and its own
        block becomes free. No step or copy may use the lease's blocks during a swap. If one may,
        pass `may_swap` False: publishing then stops at the first equal block, and returns False.
        Blocks in a window are never swapped. Raises StaleLease.
        """
        lease.require("reserved", "filled")
        doubles: list[int] = []
        for key in keys:
            parent = lease.path[-1] if lease.path else None
            node = self._tree.insert(parent, key, priority)
            if node is None:
                break
            if not self._join(lease, node, priority, doubles, may_swap=may_swap):
                return False
            lease.path.append(node)
        self._give(doubles)
        return True

    def num_blocks_missing(self, lease: Lease, num_tokens: int) -> int:
        """The number of blocks that the lease lacks to hold `num_tokens`."""
        count = self.num_blocks_for(num_tokens)
        return sum(max(0, count - len(table)) for table in lease.tables)

    def grow(self, lease: Lease, num_tokens: int) -> None:
        """Extend a lease to hold `num_tokens`. Raises PoolExhausted, StaleLease."""
        lease.require("reserved", "filled")
        self._blocks.require(self.num_blocks_missing(lease, num_tokens))
        for table in lease.tables:
            table += self._blocks.take(self.num_blocks_for(num_tokens) - len(table))
        self._note_capacity(lease)

    def keep_state(self, lease: Lease, position: int) -> None:
        """Freeze the recurrent state at `position` as a snapshot; later steps write to new blocks.

        Raises PoolExhausted.
        """
        self._blocks.require(self.shape.num_state_blocks)
        lease.snapshots.append((position, lease.state_blocks))
        lease.state_blocks = self._blocks.take(self.shape.num_state_blocks)
        self.peak_leased = max(self.peak_leased, self.num_leased)

    def free_unread(self, lease: Lease, num_computed: int) -> None:
        """Free the blocks that no step reads after `num_computed` tokens are computed. Snapshots
        among them are published first.
        """
        for group, tables in zip(self.shape.groups, self._layout.of_group, strict=True):
            if group.window is not None:
                self._give_window(lease.tables[tables], self.shape.first(group, num_computed))
        while lease.snapshots and lease.snapshots[0][0] < num_computed:
            position, blocks = lease.snapshots.pop(0)
            self._publish_state(lease, position, blocks)
            self._give(blocks)

    def sent(self, lease: Lease, first: int = 0) -> list[int]:
        """The blocks that a transfer of the lease copies, in order; see `TableLayout.sent`."""
        return self._layout.sent(lease, first)

    def full_blocks(self, lease: Lease, first: int, end: int) -> list[int]:
        """Blocks `first` to `end`, exclusive, of the lease's tables of full attention."""
        return self._layout.full_blocks(lease, first, end)

    def advance(self, lease: Lease, event: LeaseEvent) -> None:
        """Apply one transition. A lease that becomes `released` drops its references.

        After a crash, the prefix of the lease is dropped from the tree, because its blocks may be
        the cause.
        """
        was_released = lease.state == "released"
        lease.state = lease.next_state(event)
        if lease.state == "released" and not was_released:
            if event == "crash" and lease.path:
                self._blocks.reclaim(self._tree.drop(lease.path[0]))
            self._close(lease)

    def find(self, ref: LeaseRef) -> Lease:
        """The live lease of a reference. Raises StaleLease if the lease is gone, or has another
        fence.
        """
        lease = self._leases.get(ref.lease_id)
        if lease is None:
            raise StaleLease(f"lease {ref.lease_id} of request {ref.request_id} is gone")
        if lease.fence != Fence(ref.request_id, ref.choice, ref.epoch):
            raise StaleLease(f"lease {ref.lease_id} belongs to {lease.fence}, not to {ref}")
        return lease

    def release_all(self, event: LeaseEvent = "crash") -> None:
        """End every live lease and drop every prefix, as an engine does when it stops."""
        for lease in list(self._leases.values()):
            self.advance(lease, event)
        self._blocks.reclaim(self._tree.drop_all())

    def check(self) -> None:
        """Assert the ledger: every block is free, cached or leased, and references add up."""
        counted = Counter(block for lease in self.leases for block in lease.blocks)
        cached = {block for entry in self._tree.idle for block in entry.blocks}
        assert self.num_blocks == self.num_free + self.num_cached + self.num_leased
        assert len({*self._blocks.free, *cached, *counted}) == self.num_blocks
        assert self.num_leased == len(counted)
        assert all(n == counted[block] for block, n in enumerate(self._blocks.references))
        if self.shape.has_full:
            for lease in self.leases:
                live = [node for node in lease.path if node.is_live]
                assert [node.block for node in live] == lease.tables[0][: len(live)]
        self._tree.check(self._blocks.references, {one.path[-1] for one in self.leases if one.path})

    def _close(self, lease: Lease) -> None:
        del self._leases[lease.lease_id]
        self._give(lease.blocks)
        if lease.path:
            self._tree.prune(lease.path[-1])
        lease.tables, lease.path, lease.state_blocks, lease.snapshots = [], [], [], []

    def _note_capacity(self, lease: Lease) -> None:
        lengths = map(len, lease.tables)
        lease.capacity = min(lengths, default=_UNBOUNDED) * self.block_size
        self.peak_leased = max(self.peak_leased, self.num_leased)

    def _join(
        self, lease: Lease, node: PrefixNode, priority: int, doubles: list[int], *, may_swap: bool
    ) -> bool:
        """Attach the lease's next blocks to `node`, or swap the lease to the blocks of `node`.

        Blocks of the lease that are replaced are added to `doubles`. Return False if a swap is
        needed and `may_swap` is False.
        """
        at = len(lease.path)
        for index, tables in enumerate(self._layout.of_group):
            if self._num_tables == 1:  # most models: a hot path
                own: tuple[int, ...] = (lease.tables[0][at],)
            else:
                own = tuple([table[at] for table in lease.tables[tables]])
            entry = node.entries[index]
            if entry is None:
                if own[0] != FREED:
                    self._tree.attach(node, index, own)
            elif entry.blocks != own and self.shape.groups[index].window is None:
                if not may_swap:
                    return False
                self._blocks.refer(entry, priority)
                for table, block in zip(lease.tables[tables], entry.blocks, strict=True):
                    table[at] = block
                doubles += own
        return True

    def _give_window(self, tables: list[list[int]], end: int) -> None:
        """Free the blocks before block `end` of a window's tables, the oldest first."""
        first = end
        while first > 0 and tables[0][first - 1] != FREED:
            first -= 1
        for at in range(first, end):
            self._give([table[at] for table in tables])
            for table in tables:
                table[at] = FREED

    def _publish_state(self, lease: Lease, position: int, blocks: list[int]) -> None:
        """Publish a recurrent state, if `position` is the end of a published block."""
        index, rest = divmod(position, self.block_size)
        node = lease.path[index - 1] if 0 < index <= len(lease.path) and not rest else None
        if node is not None and node.is_live and node.entries[-1] is None:
            self._tree.attach(node, self._state_group, tuple(blocks))

    def _give(self, blocks: list[int]) -> None:
        if self._blocks.give(blocks):
            self.on_free()
