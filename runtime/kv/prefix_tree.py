"""The prefix tree of a pool: full blocks by what they hold, for sequences that begin alike."""

from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field

from sagellm.runtime.kv.block_key import BlockKey
from sagellm.runtime.kv.cache_log import CacheLog
from sagellm.runtime.messages import PRIORITIES

_LAST = len(PRIORITIES) - 1
_GENERATIONS = 8  # in one turnover of the pool


@dataclass(slots=True, eq=False)
class Node:
    """A full block whose keys and values are computed. Only its tree changes it.

    `priority`: of the most critical request that has used it. `generation`: when its last lease
    ended. Not `is_live`: it was evicted or dropped, and nobody finds it any more.
    """

    key: BlockKey
    block: int
    parent: "Node | None"
    priority: int
    generation: int = 0
    children: "dict[bytes, Node]" = field(default_factory=dict)
    is_live: bool = True


class PrefixTree:
    """Knows which block holds which tokens behind which others; the pool counts who leases them.

    A node that no lease refers to is idle: kept until blocks run out, then evicted. The least
    recently used generation goes first, and inside one those of less critical requests, then the
    older. A generation lasts while an eighth of the pool is handed out, so a critical request's
    blocks outlive others of about their age, and nothing stays for its priority alone.

    Who leases a node's block leases those of all its ancestors, and gives the deepest back first.
    So children idle before their parents do, and what is evicted next never has any.
    """

    def __init__(self, num_blocks: int) -> None:
        self._first: dict[bytes, Node] = {}
        self._nodes: list[Node | None] = [None] * num_blocks  # by block
        self._idle: list[OrderedDict[Node, None]] = [OrderedDict() for _ in PRIORITIES]
        self._num_handed_out = 0
        self._generation_blocks = max(1, num_blocks // _GENERATIONS)
        self.num_idle = 0
        self.num_evicted = 0
        self.log: CacheLog | None = None  # of what is stored and dropped, where it is asked for

    @property
    def hashes(self) -> Iterator[bytes]:
        """The short hashes of all nodes, parents before their children."""
        level = list(self._first.values())
        for node in level:
            level += node.children.values()
            yield node.key.short

    @property
    def idle(self) -> Iterator[Node]:
        return (node for each in self._idle for node in each)

    def child(self, parent: Node | None, key: BlockKey) -> Node | None:
        """The node of that key behind `parent`, which is live; None: behind nothing."""
        found = self._children(parent).get(key.digest)
        return found if found is not None and found.key.content == key.content else None

    def insert(self, parent: Node | None, key: BlockKey, block: int, priority: int) -> Node | None:
        """The node that was known for `key`, or a new one of `block`; `parent` is leased.

        None where there can be none: the parent is gone, or another block has this digest.
        """
        if parent is not None and not parent.is_live:
            return None
        siblings = self._children(parent)
        if key.digest in siblings:
            return self.child(parent, key)
        node = Node(key, block, parent, _clamped(priority))
        siblings[key.digest] = self._nodes[block] = node
        _raise(parent, node.priority)
        if self.log is not None:
            self.log.note(key.short, is_stored=True)
        return node

    def use(self, node: Node, priority: int, *, is_idle: bool) -> None:
        """A lease refers to it from now on."""
        if is_idle:
            del self._idle[node.priority][node]
            self.num_idle -= 1
            self.note_handed_out(1)
        _raise(node, _clamped(priority))

    def note_handed_out(self, num_blocks: int) -> None:
        """The clock: how many blocks were leased."""
        self._num_handed_out += num_blocks

    def retire(self, block: int, *, keep: bool) -> bool:
        """The block's last lease has ended: whether it is kept, idle."""
        node = self._nodes[block]
        if node is None:
            return False
        if not keep:
            self._remove(node)
            return False
        node.generation = self._num_handed_out // self._generation_blocks
        self._idle[node.priority][node] = None
        self.num_idle += 1
        return True

    def evict(self) -> int:
        """Forget the idle node that is worth least; its block."""
        oldest = [next(iter(each)) for each in self._idle if each]
        node = min(oldest, key=lambda node: (node.generation, -node.priority))
        del self._idle[node.priority][node]
        self.num_idle -= 1
        self.num_evicted += 1
        self._remove(node)
        return node.block

    def drop(self, node: Node) -> list[int]:
        """Forget a node and all behind it; the blocks of those that were idle."""
        if not node.is_live:
            return []
        self._children(node.parent).pop(node.key.digest)
        idle, open_ = [], [node]
        while open_:
            each = open_.pop()
            open_ += each.children.values()
            self._forget(each)
            if each in self._idle[each.priority]:
                del self._idle[each.priority][each]
                idle.append(each.block)
        self.num_idle -= len(idle)
        return idle

    def drop_all(self) -> list[int]:
        """Forget every node; the blocks of those that were idle."""
        return [block for node in list(self._first.values()) for block in self.drop(node)]

    def check(self, references: list[int]) -> None:
        """Assert that the tree, what is idle and the references of all blocks agree."""
        idle = set(self.idle)
        assert len(idle) == self.num_idle
        open_, num_found = list(self._first.values()), 0
        while open_:
            node = open_.pop()
            open_ += node.children.values()
            num_found += 1
            assert node.is_live
            assert self._nodes[node.block] is node
            assert (node in idle) == (references[node.block] == 0)
            if node.parent is not None:
                assert node.parent.is_live
                assert references[node.parent.block] >= references[node.block]
        assert num_found == sum(node is not None for node in self._nodes)

    def _children(self, parent: Node | None) -> dict[bytes, Node]:
        return self._first if parent is None else parent.children

    def _remove(self, node: Node) -> None:
        assert not node.children
        del self._children(node.parent)[node.key.digest]
        self._forget(node)

    def _forget(self, node: Node) -> None:
        node.is_live, self._nodes[node.block] = False, None
        if self.log is not None:
            self.log.note(node.key.short, is_stored=False)


def _raise(node: Node | None, priority: int) -> None:
    """None is less critical than those behind it: else it would be evicted before them."""
    while node is not None and node.priority > priority:
        node.priority, node = priority, node.parent


def _clamped(priority: int) -> int:
    return min(max(priority, 0), _LAST)
