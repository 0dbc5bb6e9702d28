"""Which blocks are cached, which are evicted first, and which must not be found."""

import pytest

from sagellm.runtime.kv import prefix_tree as keys
from sagellm.runtime.kv.lease import Fence
from sagellm.runtime.kv.pool import BlockPool
from sagellm.runtime.kv.prefix_tree import block_key

SIZE = 4


class Kept:
    """A pool, and sequences of whole blocks; each sequence repeats one token."""

    def __init__(self, num_blocks):
        self.pool = BlockPool(num_blocks, SIZE)
        self.number = 0

    def path(self, tokens, salt=""):
        found = [None]
        for token in tokens:
            found.append(block_key(found[-1], [token] * SIZE, salt))
        return found[1:]

    def find(self, tokens, salt=""):
        """How many blocks of a sequence are known, and their nodes."""
        nodes = []
        for key in self.path(tokens, salt):
            node = self.pool.child(nodes[-1] if nodes else None, key)
            if node is None:
                break
            nodes.append(node)
        return nodes

    def lease(self, tokens, priority=2, salt=""):
        """Compute a sequence of one block for each token, reusing cached blocks."""
        self.number += 1
        prefix = self.find(tokens, salt)
        lease = self.pool.reserve(
            Fence(str(self.number), 0, 0), len(tokens) * SIZE, prefix=prefix, priority=priority
        )
        self.pool.publish(lease, self.path(tokens, salt)[len(prefix) :], priority)
        self.pool.check()
        return lease

    def keep(self, tokens, **fields):
        self.pool.advance(self.lease(tokens, **fields), "finish")
        self.pool.check()

    def known(self, *sequences):
        return [len(self.find(tokens)) for tokens in sequences]


def test_blocks_are_kept_until_others_need_them():
    kept = Kept(4)
    kept.keep([1, 2])
    assert (kept.pool.num_free, kept.pool.num_cached) == (2, 2)
    kept.pool.reserve(Fence("x", 0, 0), 2 * SIZE)
    assert kept.known([1, 2]) == [2]
    kept.pool.reserve(Fence("y", 0, 0), 1)
    assert kept.known([1, 2]) == [1]
    assert kept.pool.num_evicted == 1
    kept.pool.check()


def test_the_least_recently_used_goes_first():
    kept = Kept(64)
    for token in (1, 2, 3):
        kept.keep([token] * 8)
    kept.keep([1] * 8)
    kept.pool.reserve(Fence("x", 0, 0), (64 - 24 + 8) * SIZE)
    assert kept.known([1] * 8, [2] * 8, [3] * 8) == [8, 0, 8]


def test_leaves_go_before_what_they_stand_on():
    kept = Kept(8)
    kept.keep([1, 2, 3])
    kept.keep([1, 2, 4])
    kept.pool.reserve(Fence("x", 0, 0), 6 * SIZE)
    assert kept.known([1, 2, 3], [1, 2, 4]) == [2, 2]
    kept.pool.reserve(Fence("y", 0, 0), SIZE)
    assert kept.known([1, 2, 3], [1, 2, 4]) == [1, 1]
    kept.pool.check()


def test_of_one_age_the_less_critical_goes_first():
    kept = Kept(64)
    kept.keep([1], priority=0)
    kept.keep([2], priority=4)
    kept.keep([3], priority=2)
    left = []
    for number in range(64 - 3 + 3):
        kept.pool.reserve(Fence(f"x{number}", 0, 0), SIZE)
        left.append(tuple(kept.known([1], [2], [3])))
    assert list(dict.fromkeys(left)) == [(1, 1, 1), (1, 0, 1), (1, 0, 0), (0, 0, 0)]


def test_what_a_critical_block_stands_on_is_as_critical():
    kept = Kept(64)
    lease = kept.lease([1], priority=2)
    kept.pool.grow(lease, 2 * SIZE)
    kept.pool.publish(lease, kept.path([1, 2])[1:], 0)
    kept.pool.advance(lease, "finish")
    kept.pool.reserve(Fence("x", 0, 0), 63 * SIZE)
    assert kept.known([1, 2]) == [1]
    kept.pool.check()


def test_nothing_stays_for_its_priority_alone():
    kept = Kept(64)
    kept.keep([1] * 4, priority=0)
    kept.keep([2] * 32, priority=4)
    kept.keep([3] * 4, priority=4)
    kept.pool.reserve(Fence("x", 0, 0), (64 - 40 + 4) * SIZE)
    assert kept.known([1] * 4, [3] * 4) == [0, 4]


def test_a_block_is_worth_what_its_most_critical_user_was():
    kept = Kept(64)
    kept.keep([1], priority=4)
    kept.keep([1], priority=0)
    kept.keep([1], priority=4)
    kept.keep([2], priority=3)
    kept.pool.reserve(Fence("x", 0, 0), 63 * SIZE)
    assert kept.known([1], [2]) == [1, 0]


@pytest.mark.parametrize("priority", [-7, 99])
def test_any_priority_is_kept_somewhere(priority):
    kept = Kept(4)
    kept.keep([1], priority=priority)
    assert kept.known([1]) == [1]


def test_equal_blocks_become_one():
    kept = Kept(8)
    first = kept.lease([1, 2])
    second = kept.pool.reserve(Fence("s", 0, 0), 3 * SIZE)  # computed beside the first
    kept.pool.publish(second, kept.path([1, 2, 3]))
    assert second.blocks[:2] == first.blocks
    assert (kept.pool.num_leased, kept.pool.num_free) == (3, 5)
    kept.pool.check()


def test_what_crashed_is_found_no_more_and_goes_free():
    kept = Kept(8)
    kept.keep([1, 9])
    other, crashing = kept.lease([1, 2]), kept.lease([1, 3])
    kept.pool.advance(crashing, "crash")
    assert kept.known([1, 2], [1, 3], [1, 9]) == [0, 0, 0]
    assert (kept.pool.num_free, kept.pool.num_cached, kept.pool.num_leased) == (6, 0, 2)
    kept.pool.grow(other, 3 * SIZE)
    kept.pool.publish(other, kept.path([1, 2, 4])[2:])  # its parent is gone
    assert kept.known([1, 2, 4]) == [0]
    kept.keep([1, 2])  # computed again, it is found again
    assert kept.known([1, 2, 4]) == [2]
    kept.pool.advance(other, "finish")
    kept.pool.check()


def test_salts_share_nothing():
    kept = Kept(8)
    kept.keep([1, 2], salt="a")
    assert len(kept.find([1, 2], "a")) == 2
    assert kept.find([1, 2], "b") == kept.find([1, 2]) == []


def test_a_collision_serves_nobody(monkeypatch):
    monkeypatch.setattr(keys, "block_digest", lambda parent, content: b"the same for all")
    kept = Kept(8)
    kept.keep([1, 2], salt="a")
    assert len(kept.find([1, 2], "a")) == 2
    assert kept.find([1, 2], "b") == kept.find([1, 3], "a")[1:] == kept.find([3], "a") == []
    kept.keep([3], salt="a")  # cannot be kept beside the other
    assert kept.find([3], "a") == []
    kept.pool.check()


def test_a_pool_that_stops_has_every_block_free():
    kept = Kept(8)
    kept.keep([1, 2])
    kept.lease([3, 4])
    kept.pool.release_all()
    assert kept.pool.num_free == 8
    kept.pool.check()
