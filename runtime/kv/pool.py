"""The block pool: reference-counted KV blocks, and the leases that hold them."""

from collections import Counter
from collections.abc import Callable, Iterator
from collections.abc import Sequence as Items

from sagellm.runtime.kv.cache_log import CacheLog
from sagellm.runtime.kv.lease import FREED, Fence, Lease, LeaseEvent, LeaseOwner
from sagellm.runtime.kv.prefix_tree import BlockKey, GroupBlocks, PrefixNode, PrefixTree
from sagellm.runtime.lease_shape import LeaseShape
from sagellm.runtime.messages import NORMAL, LeaseRef
from sagellm.runtime.port import StaleLease

_UNBOUNDED = 1 << 62  # tokens that a lease without block tables can hold


class PoolExhausted(RuntimeError):
    """Fewer blocks are available than were asked for; nothing was taken."""


class BlockPool:
    """Counts blocks, knows no storage. `num_blocks = num_free + num_cached + num_leased`, always.

    The blocks are of all KV groups of a model: `shape` says how many of them a lease takes for its
    tokens, and which it gives back on the way. A block is leased while at least one live lease
    refers to it. One that was published is cached afterwards, until blocks run out; not where
    `keeps_prefixes` is False: then only leases that live at the same time share blocks. `on_free`
    is called after blocks became available, so that whoever waits for some can be served.
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
        self.forgets = shape.forgets  # whether leases have anything to `free_unread`
        self.num_leased = 0
        self.peak_leased = 0
        self._free = list(range(num_blocks - 1, -1, -1))  # a stack: the warmest block goes first
        self._references = [0] * num_blocks
        self._leases: dict[int, Lease] = {}
        self._num_tables = sum(group.num_tables for group in shape.groups)
        self._of_group = [
            slice(end - group.num_tables, end)
            for group, end in zip(shape.groups, shape.ends, strict=True)
        ]
        self._state_group = len(shape.groups)  # of entries: comes after those of tokens
        num_groups = len(shape.groups) + (shape.num_state_blocks > 0)
        self._tree = PrefixTree(num_blocks, num_groups, is_anchored=shape.has_full)
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
        """A log of the prefixes that are kept, from now on. The one before gets no more.

        It is empty where windows or states forget: no sequence can begin with some of the blocks
        that are kept there, and a hash does not say with which.
        """
        if not self.keeps_prefixes or self.forgets:  # what only leases share is of no use, either
            return CacheLog(lambda: ())
        log = self._tree.log = CacheLog(lambda: self._tree.hashes)
        return log

    def num_blocks_for(self, num_tokens: int) -> int:
        """Of one block table without a window."""
        return -(-num_tokens // self.block_size)

    def num_blocks_needed(
        self, num_tokens: int, prefix: Items[PrefixNode] = (), *, start: int | None = None
    ) -> int:
        """How many available blocks a reservation would take."""
        start = len(prefix) * self.block_size if start is None else start
        total = self.shape.num_state_blocks
        for group, span, shared in self._shares(num_tokens, prefix, start):
            total += group * (span - len(shared)) + self._num_idle(shared)
        return total + self._num_idle(self._states(prefix))

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
        """Lease the blocks of `prefix` by reference and, behind them, new ones for `num_tokens`.

        `prefix` is a live path from the tree's root, as long as `num_reusable` says; its blocks are
        full and never written again. Tokens are computed from its end on, or from `start`, where
        what comes before is received. Raises PoolExhausted.
        """
        start = len(prefix) * self.block_size if start is None else start
        self._require(self.num_blocks_needed(num_tokens, prefix, start=start))
        spans = self.shape.spans(num_tokens, start)
        shares = [shared for _, _, shared in self._shares(num_tokens, prefix, start)]
        states = self._states(prefix)
        for entry in (entry for shared in (*shares, states) for entry in shared):
            self._refer(entry, priority)
        lease = Lease(self._next_id, fence, owner, [], num_tokens, 0)
        for group, (first, end), shared in zip(self.shape.groups, spans, shares, strict=True):
            for table in range(group.num_tables):
                held = [FREED] * first + [entry.blocks[table] for entry in shared]
                lease.tables.append(held + self._take(end - len(held)))
        lease.snapshot = self._take(self.shape.num_state_blocks)
        lease.kept = [(start, list(entry.blocks)) for entry in states]
        lease.path += prefix
        self._note_capacity(lease)
        self._next_id += 1
        self._leases[lease.lease_id] = lease
        return lease

    def child(self, parent: PrefixNode | None, key: BlockKey) -> PrefixNode | None:
        """The published block of that key behind a live `parent`."""
        return self._tree.child(parent, key)

    def num_reusable(self, path: Items[PrefixNode]) -> int:
        """How much of a live path a sequence can begin with: every group must have what is read
        from there on, all blocks, those in the window, or the state just there.
        """
        if not self.forgets:
            return len(path)
        best, since = 0, [0] * len(self.shape.groups)  # each group has all blocks since that one
        for count, node in enumerate(path, 1):
            for index in range(len(since)):
                if node.entries[index] is None:
                    since[index] = count
            position = count * self.block_size
            firsts = (self.shape.first(group, position) for group in self.shape.groups)
            has_tokens = all(have <= first for have, first in zip(since, firsts, strict=True))
            if has_tokens and (not self.shape.num_state_blocks or node.entries[-1] is not None):
                best = count
        return best

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
        (not `may_swap`) it stops there; False tells so. What lies in a window is never exchanged.
        Raises StaleLease.
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
        """How many blocks more it takes to hold so many tokens."""
        count = self.num_blocks_for(num_tokens)
        return sum(max(0, count - len(table)) for table in lease.tables)

    def grow(self, lease: Lease, num_tokens: int) -> None:
        """Extend a lease so that it holds `num_tokens`. Raises PoolExhausted, StaleLease."""
        lease.require("reserved", "filled")
        self._require(self.num_blocks_missing(lease, num_tokens))
        for table in lease.tables:
            table += self._take(self.num_blocks_for(num_tokens) - len(table))
        self._note_capacity(lease)

    def keep_state(self, lease: Lease, position: int) -> None:
        """Steps from `position` on write the state to other blocks: so it can be reused there.

        Raises PoolExhausted.
        """
        self._require(self.shape.num_state_blocks)
        lease.kept.append((position, lease.snapshot))
        lease.snapshot = self._take(self.shape.num_state_blocks)
        self.peak_leased = max(self.peak_leased, self.num_leased)

    def free_unread(self, lease: Lease, num_computed: int) -> None:
        """Give back what no step reads any more that begins at `num_computed` or later."""
        for group, tables in zip(self.shape.groups, self._of_group, strict=True):
            if group.window is not None:
                self._slide(lease.tables[tables], self.shape.first(group, num_computed))
        while lease.kept and lease.kept[0][0] < num_computed:
            position, blocks = lease.kept.pop(0)
            self._publish_state(lease, position, blocks)
            self._give(blocks)

    def sent(self, lease: Lease, first: int = 0) -> list[int]:
        """The blocks that another pool needs to go on after the lease's tokens, in one order for
        all pools of the shape; of the tables of full attention those from `first` on.
        """
        position, blocks = lease.num_tokens, []
        spans = self.shape.spans(position, position)
        for group, tables, (start, end) in zip(
            self.shape.groups, self._of_group, spans, strict=True
        ):
            start = first if group.window is None else start
            for table in lease.tables[tables]:
                blocks += table[start:end]
        return blocks + lease.state_at(position)

    def full_blocks(self, lease: Lease, first: int, end: int) -> list[int]:
        """Those of full attention alone."""
        full = self._of_group[0] if self.shape.has_full else slice(0)
        return [block for table in lease.tables[full] for block in table[first:end]]

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
        cached = {block for entry in self._tree.idle for block in entry.blocks}
        assert self.num_blocks == self.num_free + self.num_cached + self.num_leased
        assert len({*self._free, *cached, *counted}) == self.num_blocks
        assert self.num_leased == len(counted)
        assert all(n == counted[block] for block, n in enumerate(self._references))
        if self.shape.has_full:
            for lease in self.leases:
                live = [node for node in lease.path if node.is_live]
                assert [node.block for node in live] == lease.tables[0][: len(live)]
        self._tree.check(self._references, {one.path[-1] for one in self.leases if one.path})

    def _close(self, lease: Lease) -> None:
        del self._leases[lease.lease_id]
        self._give(lease.blocks)
        if lease.path:
            self._tree.prune(lease.path[-1])
        lease.tables, lease.path, lease.snapshot, lease.kept = [], [], [], []

    def _require(self, count: int) -> None:
        if count > self.num_available:
            raise PoolExhausted(
                f"{count} blocks wanted, {self.num_available} of {self.num_blocks} available"
            )

    def _note_capacity(self, lease: Lease) -> None:
        lengths = map(len, lease.tables)
        lease.capacity = min(lengths, default=_UNBOUNDED) * self.block_size
        self.peak_leased = max(self.peak_leased, self.num_leased)

    def _shares(
        self, num_tokens: int, prefix: Items[PrefixNode], start: int
    ) -> Iterator[tuple[int, int, list[GroupBlocks]]]:
        """Of each group: its tables, how many blocks each gets, and the entries that are shared."""
        spans = self.shape.spans(num_tokens, start)
        for index, (group, (first, end)) in enumerate(zip(self.shape.groups, spans, strict=True)):
            entries = (node.entries[index] for node in prefix[first:])
            yield group.num_tables, end - first, [entry for entry in entries if entry]

    def _states(self, path: Items[PrefixNode]) -> list[GroupBlocks]:
        """The snapshot at the end of a path, if there is one."""
        entry = path[-1].entries[-1] if path and self.shape.num_state_blocks else None
        return [entry] if entry else []

    def _num_idle(self, entries: Items[GroupBlocks]) -> int:
        """Blocks of those entries that no lease refers to."""
        references = self._references
        return sum(len(one.blocks) for one in entries if not references[one.blocks[0]])

    def _join(
        self, lease: Lease, node: PrefixNode, priority: int, doubles: list[int], *, may_swap: bool
    ) -> bool:
        """Attach the lease's next blocks to `node`, or refer to those that it has."""
        at = len(lease.path)
        for index, tables in enumerate(self._of_group):
            if self._num_tables == 1:  # most models
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
                self._refer(entry, priority)
                for table, block in zip(lease.tables[tables], entry.blocks, strict=True):
                    table[at] = block
                doubles += own
        return True

    def _slide(self, tables: list[list[int]], end: int) -> None:
        """Give back the blocks before `end`, the oldest first."""
        first = end
        while first > 0 and tables[0][first - 1] != FREED:
            first -= 1
        for at in range(first, end):
            self._give([table[at] for table in tables])
            for table in tables:
                table[at] = FREED

    def _publish_state(self, lease: Lease, position: int, blocks: list[int]) -> None:
        """Let others begin at `position`, where that is known by its tokens."""
        index, rest = divmod(position, self.block_size)
        node = lease.path[index - 1] if 0 < index <= len(lease.path) and not rest else None
        if node is not None and node.is_live and node.entries[-1] is None:
            self._tree.attach(node, self._state_group, tuple(blocks))

    def _refer(self, entry: GroupBlocks, priority: int) -> None:
        is_idle = not self._references[entry.blocks[0]]
        self._tree.use(entry, priority, is_idle=is_idle)
        for block in entry.blocks:
            self._references[block] += 1
            self.num_leased += is_idle

    def _take(self, count: int) -> list[int]:
        """So many blocks that hold nothing; there are enough."""
        if count <= 0:
            return []
        while len(self._free) < count:
            self._free += self._tree.evict()
        taken = self._free[: -count - 1 : -1]  # in the order of memory, where they are fresh
        del self._free[-count:]
        for block in taken:
            self._references[block] = 1
        self._tree.advance_clock(count)
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
