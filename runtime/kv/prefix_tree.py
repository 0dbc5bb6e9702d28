"""Prefix caching: a tree of full blocks, found by a keyed hash of all tokens up to their end."""

from collections import OrderedDict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from sagellm.runtime.kv.cache_log import CacheLog
from sagellm.runtime.messages import PRIORITIES
from sagellm.runtime.prefixes import HASH_BYTES, block_content, block_digest


class BlockKey(NamedTuple):
    """The identity of a full block: a keyed hash of every token up to its end, within one salt.

    `content`: the bytes that were hashed after the parent's digest: the block's token ids and, in a
    first block, the salt. Each hit compares `content`, so a hash collision never gives a sequence
    the block of other tokens.
    """

    digest: bytes
    content: bytes

    @property
    def short(self) -> bytes:
        """The hash by which routers know the block."""
        return self.digest[:HASH_BYTES]


def block_key(parent: BlockKey | None, token_ids: Iterable[int], salt: str) -> BlockKey:
    """The key of a block of `token_ids` after `parent`, which is None for a sequence's
    first block.
    """
    content = block_content(token_ids, salt if parent is None else None)
    return BlockKey(block_digest(parent.digest if parent else b"", content), content)


_LAST = len(PRIORITIES) - 1
_GENERATIONS = 8  # that pass while as many blocks are handed out as the pool has


@dataclass(slots=True, eq=False)
class PrefixNode:
    """A full block of tokens, which follow the tokens of its ancestors. Only the tree changes a
    node.

    `entries`: for each KV group the blocks in memory, or None if these were never kept or are
    evicted. `priority`: that of the most critical request that has used the node. `is_live`: False
    after the node was evicted or dropped. Lookups find only live nodes.
    """

    key: BlockKey
    parent: "PrefixNode | None"
    priority: int
    entries: "list[GroupBlocks | None]"
    children: "dict[bytes, PrefixNode]" = field(default_factory=dict)
    is_live: bool = True

    @property
    def block(self) -> int:
        """The block in memory, for a model of one block table."""
        entry = self.entries[0]
        assert entry is not None
        return entry.blocks[0]


@dataclass(slots=True, eq=False)
class GroupBlocks:
    """The blocks of one node in one KV group: one block of each table, or a recurrent state.

    The blocks are leased, freed and evicted together. `priority` and `generation` are set when the
    last lease on the blocks ends.
    """

    node: PrefixNode
    group: int
    blocks: tuple[int, ...]
    priority: int = _LAST
    generation: int = 0


class PrefixTree:
    """Maps tokens to cached blocks; the allocator counts the leases on blocks.

    An entry that no lease refers to is idle: cached until blocks run out, then evicted. Eviction
    takes the least recently used generation first. Within a generation it takes entries of less
    critical requests first, then older entries. A generation lasts while an eighth of the pool is
    handed out. So blocks of a critical request outlive other blocks of about their age, and no
    block stays for its priority alone.

    `is_anchored`: whether group 0 keeps all tokens (full attention). Then a lease on a node's entry
    in group 0 also leases those entries of all ancestors, and frees the deepest first. Children
    therefore become idle before their parents, and the next evicted node never has children.
    Entries of other groups come and go; a node without entries is removed once it has no children.
    """

    def __init__(self, num_blocks: int, num_groups: int = 1, *, is_anchored: bool = True) -> None:
        self._first: dict[bytes, PrefixNode] = {}
        self._owners: list[GroupBlocks | None] = [None] * num_blocks  # by block
        self._idle: list[OrderedDict[GroupBlocks, None]] = [OrderedDict() for _ in PRIORITIES]
        self._num_groups = num_groups
        self._is_anchored = is_anchored
        self._num_handed_out = 0
        self._generation_blocks = max(1, num_blocks // _GENERATIONS)
        self.num_idle = 0  # blocks
        self.num_evicted = 0  # blocks
        self.log: CacheLog | None = None  # stored and dropped blocks, if a reader asked for them

    @property
    def hashes(self) -> Iterator[bytes]:
        """The short hashes of all nodes, parents before their children."""
        level = list(self._first.values())
        for node in level:
            level += node.children.values()
            yield node.key.short

    @property
    def idle(self) -> Iterator[GroupBlocks]:
        return (entry for each in self._idle for entry in each)

    def child(self, parent: PrefixNode | None, key: BlockKey) -> PrefixNode | None:
        """The live node of `key` after `parent`, or at the root if `parent` is None; None if it is
        unknown.
        """
        found = self._children(parent).get(key.digest)
        return found if found is not None and found.key.content == key.content else None

    def insert(self, parent: PrefixNode | None, key: BlockKey, priority: int) -> PrefixNode | None:
        """Find or create the node of `key`; a new node has no entries. The caller holds a lease on
        `parent`.

        Return None if the parent was dropped, or if a node with other content has this digest.
        """
        if parent is not None and not parent.is_live:
            return None
        siblings = self._children(parent)
        if key.digest in siblings:
            return self.child(parent, key)
        node = PrefixNode(key, parent, _clamped(priority), [None] * self._num_groups)
        siblings[key.digest] = node
        _raise(parent, node.priority)
        if self.log is not None:
            self.log.note(key.short, is_stored=True)
        return node

    def attach(self, node: PrefixNode, group: int, blocks: tuple[int, ...]) -> None:
        """Store leased blocks as the entry of `node` in `group`."""
        entry = node.entries[group] = GroupBlocks(node, group, blocks)
        for block in blocks:
            self._owners[block] = entry

    def use(self, entry: GroupBlocks, priority: int, *, is_idle: bool) -> None:
        """Record a new lease on `entry`. `is_idle`: whether the entry was idle until now."""
        if is_idle:
            del self._idle[entry.priority][entry]
            self.num_idle -= len(entry.blocks)
            self.advance_clock(len(entry.blocks))
        _raise(entry.node, _clamped(priority))

    def advance_clock(self, num_blocks: int) -> None:
        """Count handed out blocks: they are the clock of the generations."""
        self._num_handed_out += num_blocks

    def retire(self, block: int, *, keep: bool) -> bool:
        """Record that the last lease on a block has ended. Return whether the block stays cached.

        The last leases on all blocks of an entry end together.
        """
        entry = self._owners[block]
        if entry is None:
            return False
        if not keep:
            self._forget(entry)
            return False
        if block == entry.blocks[0]:  # once for all blocks of the entry
            entry.generation = self._num_handed_out // self._generation_blocks
            entry.priority = entry.node.priority
            self._idle[entry.priority][entry] = None
            self.num_idle += len(entry.blocks)
        return True

    def evict(self) -> list[int]:
        """Evict the idle entry that is worth the least. If the entry anchors its node, evict the
        whole node. Return the blocks.
        """
        oldest = [next(iter(each)) for each in self._idle if each]
        if len(oldest) > 1:
            oldest.sort(key=lambda entry: (entry.generation, -entry.priority))
        entry = oldest[0]
        blocks = [*self._take_idle(entry)]
        if self._is_anchored and entry.group == 0:
            for other in entry.node.entries:
                if other is not None and other is not entry:
                    blocks += self._take_idle(other)
        self.num_evicted += len(blocks)
        self._forget(entry)
        return blocks

    def drop(self, node: PrefixNode) -> list[int]:
        """Remove a node and all its descendants. Return the blocks of entries that were idle."""
        if not node.is_live:
            return []
        self._children(node.parent).pop(node.key.digest)
        blocks: list[int] = []
        open_ = [node]
        while open_:
            each = open_.pop()
            open_ += each.children.values()
            self._end(each)
            for entry in each.entries:
                if entry is not None:
                    blocks += self._take_idle(entry)
                    self._disown(entry)
        return blocks

    def drop_all(self) -> list[int]:
        """Remove every node. Return the blocks of entries that were idle."""
        return [block for node in list(self._first.values()) for block in self.drop(node)]

    def prune(self, node: PrefixNode | None) -> None:
        """Remove a node that has no entries and no children, then its parents as long as they have
        none.
        """
        while node is not None and node.is_live and not node.children and not any(node.entries):
            del self._children(node.parent)[node.key.digest]
            self._end(node)
            node = node.parent

    def check(self, references: list[int], tips: "set[PrefixNode]") -> None:
        """Assert that tree, idle entries and references agree.

        `tips`: the last nodes of live leases, which may be without entries.
        """
        idle = set(self.idle)
        assert sum(len(entry.blocks) for entry in idle) == self.num_idle
        open_, num_owned = list(self._first.values()), 0
        while open_:
            node = open_.pop()
            open_ += node.children.values()
            assert node.is_live
            assert node.children or any(node.entries) or node in tips
            for entry in filter(None, node.entries):
                num_owned += len(entry.blocks)
                assert all(self._owners[block] is entry for block in entry.blocks)
                assert {references[block] for block in entry.blocks} <= {
                    references[entry.blocks[0]]
                }
                assert (entry in idle) == (references[entry.blocks[0]] == 0)
            if node.parent is not None:
                assert node.parent.is_live
                if self._is_anchored:
                    assert references[node.parent.block] >= references[node.block]
        assert num_owned == sum(owner is not None for owner in self._owners)

    def _children(self, parent: PrefixNode | None) -> dict[bytes, PrefixNode]:
        return self._first if parent is None else parent.children

    def _take_idle(self, entry: GroupBlocks) -> tuple[int, ...]:
        """Take an entry off the idle list. Return its blocks, or none if it was leased."""
        idle = self._idle[entry.priority]
        if entry not in idle:
            return ()
        del idle[entry]
        self.num_idle -= len(entry.blocks)
        return entry.blocks

    def _end(self, node: PrefixNode) -> None:
        node.is_live = False
        if self.log is not None:
            self.log.note(node.key.short, is_stored=False)

    def _disown(self, entry: GroupBlocks) -> None:
        entry.node.entries[entry.group] = None
        for block in entry.blocks:
            self._owners[block] = None

    def _forget(self, entry: GroupBlocks) -> None:
        """Remove an entry that is not idle. Remove its node too, if the entry anchors the node or
        was all that kept it.
        """
        node = entry.node
        if not (self._is_anchored and entry.group == 0):
            self._disown(entry)
            self.prune(node)
            return
        assert not node.children
        for other in node.entries:
            if other is not None:
                self._disown(other)
        del self._children(node.parent)[node.key.digest]
        self._end(node)


def _raise(node: PrefixNode | None, priority: int) -> None:
    """Raise the priority of a node and its ancestors: a parent must not be evicted before a
    child.
    """
    while node is not None and node.priority > priority:
        node.priority, node = priority, node.parent


def _clamped(priority: int) -> int:
    return min(max(priority, 0), _LAST)
