"""A mapping whose updates give a new mapping and share nearly all of the old one."""

from collections.abc import Hashable, Iterable, Iterator, Mapping
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")

# 32 dicts of n / 32 entries: an update copies one of them and 32 pointers, about a microsecond for
# a thousand entries, where copying one dict of them all would take ten.
_NUM_LEAVES = 32


class PersistentMap(Mapping[K, V], Generic[K, V]):
    """For the state of logic operators, which must survive unchanged when an input is undone.

    Order of iteration is not defined.
    """

    __slots__ = ("_leaves", "_len")

    def __init__(self, items: Iterable[tuple[K, V]] = ()) -> None:
        leaves: list[dict[K, V]] = [{} for _ in range(_NUM_LEAVES)]
        for key, value in items:
            leaves[hash(key) % _NUM_LEAVES][key] = value
        self._leaves = tuple(leaves)
        self._len = sum(map(len, leaves))

    def __getitem__(self, key: K) -> V:
        return self._leaves[hash(key) % _NUM_LEAVES][key]

    def __iter__(self) -> Iterator[K]:
        for leaf in self._leaves:
            yield from leaf

    def __len__(self) -> int:
        return self._len

    def __repr__(self) -> str:
        return f"PersistentMap({dict(self)!r})"

    def with_item(self, key: K, value: V) -> "PersistentMap[K, V]":
        """The same mapping with `key` set."""
        index = hash(key) % _NUM_LEAVES
        return self._with_leaf(index, {**self._leaves[index], key: value})

    def without(self, key: K) -> "PersistentMap[K, V]":
        """The same mapping without `key`; itself where the key is not there."""
        index = hash(key) % _NUM_LEAVES
        if key not in self._leaves[index]:
            return self
        leaf = self._leaves[index].copy()
        del leaf[key]
        return self._with_leaf(index, leaf)

    def _with_leaf(self, index: int, leaf: dict[K, V]) -> "PersistentMap[K, V]":
        leaves = list(self._leaves)
        leaves[index] = leaf
        changed: PersistentMap[K, V] = PersistentMap.__new__(PersistentMap)
        changed._leaves = tuple(leaves)
        changed._len = self._len - len(self._leaves[index]) + len(leaf)
        return changed
