"""The log of a pool: in order and bounded; it begins again when a reader missed a change."""

import random

import pytest

from sagellm.runtime.kv import cache_log
from sagellm.runtime.kv.cache_log import CacheLog
from sagellm.runtime.kv.lease import Fence
from sagellm.runtime.kv.pool import BlockPool
from sagellm.runtime.kv.prefix_tree import BlockKey, block_key
from sagellm.runtime.lease_shape import LeaseShape, TokenGroup
from sagellm.runtime.prefixes import hashes_in

SIZE = 4


def path(*tokens: int) -> list[BlockKey]:
    """The keys of a sequence that repeats each of these tokens for a block."""
    keys: list[BlockKey] = []
    for token in tokens:
        keys.append(block_key(keys[-1] if keys else None, [token] * SIZE, ""))
    return keys


def keep(pool: BlockPool, name: str, *tokens: int) -> None:
    """Compute a sequence, and leave its blocks in the cache."""
    prefix, keys = [], path(*tokens)
    while len(prefix) < len(keys):
        node = pool.child(prefix[-1] if prefix else None, keys[len(prefix)])
        if node is None:
            break
        prefix.append(node)
    lease = pool.reserve(Fence(name, 0, 0), len(tokens) * SIZE, prefix=prefix)
    pool.publish(lease, keys[len(prefix) :])
    pool.advance(lease, "finish")


class Reader:
    """Collects the reports of a log."""

    def __init__(self, log: CacheLog) -> None:
        self.log = log
        self.known: set[bytes] = set()
        self.num_reports = self.num_first = self.sequence = 0

    def read(self) -> set[bytes]:
        while (report := self.log.take()) is not None:
            assert report.sequence == self.sequence + 1
            self.sequence = report.sequence
            self.num_reports += 1
            self.num_first += report.is_first
            if report.is_first:
                self.known.clear()
            self.known |= set(hashes_in(report.stored))
            self.known -= set(hashes_in(report.dropped))
        return self.known


def shorts(*tokens: int) -> list[bytes]:
    return [key.short for key in path(*tokens)]


def test_a_reader_that_comes_later_is_told_all_parents_first() -> None:
    pool = BlockPool(16, SIZE)
    keep(pool, "a", 1, 2, 3)
    keep(pool, "b", 1, 9)
    report = pool.open_log().take()
    assert report is not None
    told = list(hashes_in(report.stored))
    assert report.is_first
    assert set(told) == {*shorts(1, 2, 3), *shorts(1, 9)}
    assert told.index(shorts(1)[0]) < told.index(shorts(1, 2)[1]) < told.index(shorts(1, 2, 3)[2])


def test_what_is_stored_and_evicted_is_told_once_a_read() -> None:
    pool = BlockPool(3, SIZE)
    reader = Reader(pool.open_log())
    assert reader.read() == set()
    keep(pool, "a", 1, 2)
    assert reader.read() == set(shorts(1, 2))
    keep(pool, "b", 5, 6, 7)  # evicts both
    assert reader.read() == set(shorts(5, 6, 7))
    assert reader.num_reports == 3
    assert not reader.log.has_changes


def test_a_reader_knows_what_the_pool_has_whatever_happens() -> None:
    draw = random.Random(3)
    pool = BlockPool(12, SIZE)
    reader = Reader(pool.open_log())
    for number in range(300):
        keep(pool, str(number), *(draw.randint(1, 3) for _ in range(draw.randint(1, 6))))
        if draw.random() < 0.3:
            assert reader.read() == set(pool._tree.hashes)
        if draw.random() < 0.02:
            reader.log.resend_all()
    pool.release_all()
    assert reader.read() == set()


def test_a_slow_reader_costs_bounded_memory_and_begins_anew(monkeypatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setattr(cache_log, "MAX_PENDING", 8)
    monkeypatch.setattr(cache_log, "MAX_REPORTED", 3)
    pool = BlockPool(12, SIZE)
    reader = Reader(pool.open_log())
    reader.read()
    for number in range(40):
        keep(pool, str(number), number, number + 1)
        assert len(reader.log._changes) <= 8
    assert reader.read() == set(pool._tree.hashes)
    assert reader.num_first == 2
    assert reader.num_reports == 1 + 4  # of 3 blocks each


def test_changes_while_all_is_told_in_pieces_come_after_it(monkeypatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setattr(cache_log, "MAX_REPORTED", 2)
    pool = BlockPool(6, SIZE)
    keep(pool, "a", 1, 2, 3, 4, 5, 6)
    reader = Reader(pool.open_log())
    first = reader.log.take()
    assert first is not None
    reader.known, reader.sequence = set(hashes_in(first.stored)), 1
    keep(pool, "b", 7, 8)
    assert reader.read() == {*shorts(1, 2, 3, 4), *shorts(7, 8)}


def test_nothing_is_noted_before_anybody_asks_nor_where_prefixes_are_not_kept() -> None:
    pool = BlockPool(8, SIZE)
    keep(pool, "a", 1, 2)
    assert pool._tree.log is None
    without = BlockPool(8, SIZE, keeps_prefixes=False)
    reader = Reader(without.open_log())
    lease = without.reserve(Fence("a", 0, 0), SIZE)
    without.publish(lease, path(1))
    assert reader.read() == set()


@pytest.mark.parametrize(
    "shape",
    [LeaseShape(SIZE, (TokenGroup(), TokenGroup(1, 6))), LeaseShape(SIZE, num_state_blocks=1)],
    ids=["windows", "states"],
)
def test_a_pool_that_forgets_tells_nothing(shape: LeaseShape) -> None:
    """Such a pool may cache blocks that no sequence can reuse."""
    pool = BlockPool(32, SIZE, shape=shape)
    reader = Reader(pool.open_log())
    lease = pool.reserve(Fence("a", 0, 0), 4 * SIZE)
    pool.grow(lease, 4 * SIZE)
    pool.publish(lease, path(1, 2, 3, 4))
    assert any(pool._tree.hashes)
    assert reader.read() == Reader(pool.open_log()).read() == set()
