"""The block pool: no block is lost, shared by accident, or freed while a lease refers to it."""

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from sagellm.runtime.kv.block_allocator import PoolExhausted
from sagellm.runtime.kv.lease import FAULTS, Fence
from sagellm.runtime.kv.pool import BlockPool
from sagellm.runtime.kv.prefix_tree import block_key
from sagellm.runtime.port import StaleLease

A, B = Fence("a", 0, 0), Fence("b", 0, 0)


def key_path(size, token_id, count):
    """The keys of the first `count` blocks of a sequence that repeats one token."""
    keys = [None]
    for _ in range(count):
        keys.append(block_key(keys[-1], [token_id] * size, ""))
    return keys[1:]


def fork(pool, parent, fence, num_shared, num_tokens):
    """Publish leading blocks of a lease, and lease them by reference for another."""
    new = key_path(pool.block_size, parent.lease_id, num_shared)[len(parent.path) :]
    pool.publish(parent, new)
    return pool.reserve(fence, num_tokens, prefix=parent.path[:num_shared])


def test_reserve_takes_whole_blocks():
    pool = BlockPool(8, 16)
    lease = pool.reserve(A, 17)
    assert len(lease.blocks) == 2
    assert lease.capacity == 32
    assert (pool.num_free, pool.num_cached, pool.num_leased) == (6, 0, 2)


def test_an_exhausted_pool_takes_nothing():
    pool = BlockPool(4, 16)
    pool.reserve(A, 48)
    with pytest.raises(PoolExhausted, match="2 blocks wanted, 1 of 4 available"):
        pool.reserve(B, 32)
    assert pool.num_free == 1
    pool.check()


def test_growing_adds_only_what_is_missing():
    pool = BlockPool(4, 16)
    lease = pool.reserve(A, 16)
    before = list(lease.blocks)
    pool.grow(lease, 17)
    assert lease.blocks[:1] == before
    assert len(lease.blocks) == 2


def test_a_released_lease_cannot_grow():
    pool = BlockPool(4, 16)
    lease = pool.reserve(A, 16)
    pool.advance(lease, "finish")
    with pytest.raises(StaleLease):
        pool.grow(lease, 17)


@pytest.mark.parametrize(("is_kept", "num_cached"), [(True, 2), (False, 0)])
def test_shared_blocks_are_available_after_the_last_reference(is_kept, num_cached):
    pool = BlockPool(8, 16, keeps_prefixes=is_kept)
    parent = pool.reserve(A, 40)
    child = fork(pool, parent, Fence("a", 1, 0), 2, 40)
    assert child.blocks[:2] == parent.blocks[:2]
    assert child.blocks[2] != parent.blocks[2]
    assert pool.num_leased == 4
    pool.advance(parent, "finish")
    assert pool.num_leased == 3
    pool.advance(child, "cancel")
    assert (pool.num_free, pool.num_cached, pool.num_leased) == (8 - num_cached, num_cached, 0)
    pool.check()


def test_releasing_twice_frees_once():
    pool = BlockPool(4, 16)
    lease = pool.reserve(A, 16)
    pool.advance(lease, "cancel")
    pool.advance(lease, "expire")
    assert pool.num_free == 4
    pool.check()


def test_find_obeys_the_fence():
    pool = BlockPool(4, 16)
    ref = pool.reserve(A, 16).ref("p", 0)
    assert pool.find(ref).fence == A
    with pytest.raises(StaleLease, match="belongs to"):
        pool.find(msgspec.structs.replace(ref, epoch=1))
    pool.release_all()
    with pytest.raises(StaleLease, match="is gone"):
        pool.find(ref)


def test_waiters_hear_of_blocks_that_became_available_only():
    heard = []
    pool = BlockPool(4, 16, lambda: heard.append(pool.num_available))
    parent = pool.reserve(A, 16)
    child = fork(pool, parent, Fence("a", 1, 0), 1, 16)
    pool.advance(parent, "finish")
    assert heard == []
    pool.advance(child, "finish")
    assert heard == [4]


def test_peak_is_remembered():
    pool = BlockPool(8, 16)
    pool.advance(pool.reserve(A, 80), "finish")
    pool.reserve(A, 16)
    assert pool.peak_leased == 5


@given(st.lists(st.integers(0, 60), max_size=12))
def test_blocks_of_live_leases_are_disjoint(sizes):
    pool = BlockPool(16, 4)
    held = []
    for index, size in enumerate(sizes):
        try:
            held += pool.reserve(Fence(str(index), 0, 0), size).blocks
        except PoolExhausted:
            assert pool.num_blocks_for(size) > pool.num_free
    assert len(set(held)) == len(held) == pool.num_leased


def test_a_block_that_is_read_is_not_exchanged_for_its_equal():
    pool = BlockPool(8, 4)
    keys = key_path(4, 1, 2)
    first, second = pool.reserve(A, 8), pool.reserve(B, 8)
    assert pool.publish(first, keys)
    blocks = list(second.blocks)
    assert not pool.publish(second, keys, may_swap=False)
    assert second.blocks == blocks
    assert second.path == []
    assert pool.publish(second, keys)
    assert second.blocks == first.blocks
    pool.check()


def test_a_block_is_not_evicted_before_a_more_critical_one_behind_it():
    pool = BlockPool(4, 4)
    keys = key_path(4, 1, 2)
    first, second = pool.reserve(A, 8), pool.reserve(B, 8)
    pool.publish(first, keys, 1)
    pool.publish(second, keys[:1], 1)
    pool.publish(second, keys[1:], 0)
    pool.advance(first, "cancel")
    pool.advance(second, "cancel")
    pool.reserve(A, 12)
    assert pool.child(None, keys[0]) is not None
    pool.check()


class PoolMachine(RuleBasedStateMachine):
    """Any order of reserving, growing, publishing, sharing and ending keeps the ledger.

    Sequences repeat one of three tokens, so that they share prefixes with many others; `known` is
    what each block was published to hold.
    """

    keeps_prefixes = True

    def __init__(self):
        super().__init__()
        self.pool = BlockPool(12, 4, keeps_prefixes=self.keeps_prefixes)
        self.leases = {}  # to the token that each repeats
        self.number = 0

    def fence(self):
        self.number += 1
        return Fence(f"r{self.number % 3}", self.number, 0)

    def found(self, token_id, most):
        path = []
        for key in key_path(4, token_id, most):
            node = self.pool.child(path[-1] if path else None, key)
            if node is None:
                break
            path.append(node)
        return path

    @rule(num_tokens=st.integers(0, 30), token_id=st.integers(0, 2), priority=st.integers(0, 4))
    def reserve(self, num_tokens, token_id, priority):
        prefix = self.found(token_id, num_tokens // 4)
        wanted = self.pool.num_blocks_needed(num_tokens, prefix)
        before = self.pool.num_available
        if wanted > before:
            with pytest.raises(PoolExhausted):
                self.pool.reserve(self.fence(), num_tokens, prefix=prefix)
            assert self.pool.num_available == before
            return
        lease = self.pool.reserve(self.fence(), num_tokens, prefix=prefix, priority=priority)
        assert self.pool.num_available == before - wanted
        assert lease.blocks[: len(prefix)] == [node.block for node in prefix]
        self.leases[lease] = token_id

    @precondition(lambda self: self.leases)
    @rule(data=st.data(), num_tokens=st.integers(0, 40))
    def grow(self, data, num_tokens):
        lease = data.draw(st.sampled_from(list(self.leases)))
        needed = self.pool.num_blocks_for(num_tokens) - len(lease.blocks)
        if lease.state != "released" and needed <= self.pool.num_available:
            self.pool.grow(lease, num_tokens)
            assert lease.capacity >= num_tokens

    @precondition(lambda self: self.leases)
    @rule(data=st.data(), priority=st.integers(0, 4))
    def publish(self, data, priority):
        lease = data.draw(st.sampled_from(list(self.leases)))
        if lease.state == "released":
            return
        num_full = data.draw(st.integers(0, len(lease.blocks)))
        keys = key_path(4, self.leases[lease], num_full)
        was_live = not lease.path or lease.path[-1].is_live
        before = len(lease.path)
        self.pool.publish(lease, keys[before:], priority)
        assert len(lease.path) == (max(before, num_full) if was_live else before)

    @precondition(lambda self: self.leases)
    @rule(data=st.data(), event=st.sampled_from(FAULTS))
    def end(self, data, event):
        lease = data.draw(st.sampled_from(list(self.leases)))
        path = list(lease.path)
        self.pool.advance(lease, event)
        assert event != "crash" or not any(node.is_live for node in path)

    @invariant()
    def balances(self):
        self.pool.check()
        live = [lease for lease in self.leases if lease.state != "released"]
        assert self.pool.num_leased == len({block for lease in live for block in lease.blocks})
        assert self.pool.num_cached == 0 or self.keeps_prefixes

    def teardown(self):
        self.pool.release_all()
        self.pool.check()
        assert self.pool.num_free == 12


class UnkeptMachine(PoolMachine):
    keeps_prefixes = False


TestPoolMachine = PoolMachine.TestCase
TestUnkeptMachine = UnkeptMachine.TestCase
TestPoolMachine.settings = TestUnkeptMachine.settings = settings(
    max_examples=40, stateful_step_count=30
)
