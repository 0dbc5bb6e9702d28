"""Prefix caching: full blocks by a keyed hash of their tokens, for sequences that begin alike."""

from collections import OrderedDict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from sagellm.runtime.kv.cache_log import CacheLog
from sagellm.runtime.messages import PRIORITIES
from sagellm.runtime.prefixes import HASH_BYTES, block_content, block_digest


class BlockKey(NamedTuple):
    """`content` is what was hashed behind the parent's digest: token ids and, of a first block, the
    salt. It is compared at each hit, so that a collision would serve nobody else's block.
    """

    digest: bytes
    content: bytes

    @property
    def short(self) -> bytes:
        """The hash by which routers know it."""
        return self.digest[:HASH_BYTES]


def block_key(parent: BlockKey | None, token_ids: Iterable[int], salt: str) -> BlockKey:
    """The key of a block of `token_ids` behind `parent`; None: it is a sequence's first block."""
    content = block_content(token_ids, salt if parent is None else None)
    return BlockKey(block_digest(parent.digest if parent else b"", content), content)


_LAST = len(PRIORITIES) - 1
_GENERATIONS = 8  # in one turnover of the pool


@dataclass(slots=True, eq=False)
class PrefixNode:
    """A block of tokens after those of its parents, all computed. Only its tree changes it.

    `entries`: where that memory lies, by KV group; None where it was never kept, or is gone.
    `priority`: of the most critical request that has used it. Not `is_live`: it was evicted or
    dropped, and nobody finds it any more.
    """

    key: BlockKey
    parent: "PrefixNode | None"
    priority: int
    entries: "list[GroupBlocks | None]"
    children: "dict[bytes, PrefixNode]" = field(default_factory=dict)
    is_live: bool = True

    @property
    def block(self) -> int:
        """Where a model of one block table has it."""
        entry = self.entries[0]
        assert entry is not None
        return entry.blocks[0]


@dataclass(slots=True, eq=False)
class GroupBlocks:
    """The blocks of one node in one KV group: a block of each table, or a snapshot of state.

    They are leased, given back and evicted together. `priority`, `generation`: when the last lease
    on them ended.
    """

    node: PrefixNode
    group: int
    blocks: tuple[int, ...]
    priority: int = _LAST
    generation: int = 0


class PrefixTree:
    """Knows which blocks hold which tokens behind which others; the pool counts who leases them.

    An entry that no lease refers to is idle: kept until blocks run out, then evicted. The least
    recently used generation goes first, and inside one those of less critical requests, then the
    older. A generation lasts while an eighth of the pool is handed out, so a critical request's
    blocks outlive others of about their age, and nothing stays for its priority alone.

    `is_anchored`: group 0 keeps all tokens. Who leases its entry of a node leases those of all
    ancestors, and gives the deepest back first. So children idle before their parents do, and what
    is evicted next never has any; the node goes with it. Entries of other groups come and go, and a
    node without any entry goes when it has no children.
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
        self.log: CacheLog | None = None  # of what is stored and dropped, where it is asked for

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
        """The node of that key behind `parent`, which is live; None: behind nothing."""
        found = self._children(parent).get(key.digest)
        return found if found is not None and found.key.content == key.content else None

    def insert(self, parent: PrefixNode | None, key: BlockKey, priority: int) -> PrefixNode | None:
        """The node that was known for `key`, or a new one without entries; `parent` is leased.

        None where there can be none: the parent is gone, or another node has this digest.
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
        """From now on these blocks, which are leased, have the memory of a node in that group."""
        entry = node.entries[group] = GroupBlocks(node, group, blocks)
        for block in blocks:
            self._owners[block] = entry

    def use(self, entry: GroupBlocks, priority: int, *, is_idle: bool) -> None:
        """A lease refers to it from now on."""
        if is_idle:
            del self._idle[entry.priority][entry]
            self.num_idle -= len(entry.blocks)
            self.advance_clock(len(entry.blocks))
        _raise(entry.node, _clamped(priority))

    def advance_clock(self, num_blocks: int) -> None:
        """The clock: how many blocks were leased."""
        self._num_handed_out += num_blocks

    def retire(self, block: int, *, keep: bool) -> bool:
        """The block's last lease has ended: whether it is kept, idle.

        The last leases of all blocks of an entry end together.
        """
        entry = self._owners[block]
        if entry is None:
            return False
        if not keep:
            self._forget(entry)
            return False
        if block == entry.blocks[0]:
            entry.generation = self._num_handed_out // self._generation_blocks
            entry.priority = entry.node.priority
            self._idle[entry.priority][entry] = None
            self.num_idle += len(entry.blocks)
        return True

    def evict(self) -> list[int]:
        """Forget the idle entry that is worth least, and its node with it; their blocks."""
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
        """Forget a node and all behind it; the blocks of those entries that were idle."""
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
        """Forget every node; the blocks of those entries that were idle."""
        return [block for node in list(self._first.values()) for block in self.drop(node)]

    def prune(self, node: PrefixNode | None) -> None:
        """Forget a node that is there for nothing, and its parents that are so then."""
        while node is not None and node.is_live and not node.children and not any(node.entries):
            del self._children(node.parent)[node.key.digest]
            self._end(node)
            node = node.parent

    def check(self, references: list[int], tips: "set[PrefixNode]") -> None:
        """Assert that the tree, what is idle and the references of all blocks agree.

        `tips`: where live leases end; there may be nodes without entries.
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
        """Its blocks where it was idle; it is so no more."""
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
        """An entry that is not idle, and its node where nothing is left that it is there for."""
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
    """None is less critical than those behind it: else it would be evicted before them."""
    while node is not None and node.priority > priority:
        node.priority, node = priority, node.parent


def _clamped(priority: int) -> int:
    return min(max(priority, 0), _LAST)
