"""The block pool: no block is lost, shared by accident, or freed while somebody refers to it."""

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from sagellm.runtime.engine.port import StaleLease
from sagellm.runtime.kv.lease import FAULTS, Fence
from sagellm.runtime.kv.pool import BlockPool, PoolExhausted

A, B = Fence("a", 0, 0), Fence("b", 0, 0)


def test_reserve_takes_whole_blocks():
    pool = BlockPool(8, 16)
    lease = pool.reserve(A, 17)
    assert len(lease.blocks) == 2
    assert lease.capacity == 32
    assert (pool.num_free, pool.num_cached, pool.num_leased) == (6, 0, 2)


def test_an_exhausted_pool_takes_nothing():
    pool = BlockPool(4, 16)
    pool.reserve(A, 48)
    with pytest.raises(PoolExhausted, match="2 blocks wanted, 1 of 4 free"):
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


def test_shared_blocks_are_free_after_the_last_reference():
    pool = BlockPool(8, 16)
    parent = pool.reserve(A, 40)
    child = pool.fork(parent, Fence("a", 1, 0), 2, 40)
    assert child.blocks[:2] == parent.blocks[:2]
    assert child.blocks[2] != parent.blocks[2]
    assert pool.num_leased == 4
    pool.advance(parent, "finish")
    assert pool.num_leased == 3
    pool.advance(child, "cancel")
    assert pool.num_leased == 0
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


def test_siblings_are_other_choices_of_the_same_epoch():
    pool = BlockPool(8, 16)
    first = pool.reserve(Fence("a", 0, 0), 16)
    pool.reserve(Fence("a", 1, 1), 16)
    pool.reserve(B, 16)
    assert pool.siblings(Fence("a", 1, 0)) == [first]
    assert pool.siblings(Fence("a", 0, 0)) == []


def test_waiters_hear_of_freed_blocks_only():
    heard = []
    pool = BlockPool(4, 16, lambda: heard.append(pool.num_free))
    parent = pool.reserve(A, 16)
    child = pool.fork(parent, Fence("a", 1, 0), 1, 16)
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


class PoolMachine(RuleBasedStateMachine):
    """Any order of reserving, growing, forking and ending keeps the ledger."""

    def __init__(self):
        super().__init__()
        self.pool = BlockPool(12, 4)
        self.leases = []
        self.number = 0

    def fence(self):
        self.number += 1
        return Fence(f"r{self.number % 3}", self.number, 0)

    @rule(num_tokens=st.integers(0, 30))
    def reserve(self, num_tokens):
        if self.pool.num_blocks_for(num_tokens) <= self.pool.num_free:
            self.leases.append(self.pool.reserve(self.fence(), num_tokens))

    @precondition(lambda self: self.leases)
    @rule(data=st.data(), num_tokens=st.integers(0, 40))
    def grow(self, data, num_tokens):
        lease = data.draw(st.sampled_from(self.leases))
        needed = self.pool.num_blocks_for(num_tokens) - len(lease.blocks)
        if lease.state != "released" and needed <= self.pool.num_free:
            self.pool.grow(lease, num_tokens)
            assert lease.capacity >= num_tokens

    @precondition(lambda self: self.leases)
    @rule(data=st.data(), extra=st.integers(0, 10))
    def fork(self, data, extra):
        parent = data.draw(st.sampled_from(self.leases))
        num_shared = data.draw(st.integers(0, len(parent.blocks)))
        num_tokens = num_shared * 4 + extra
        if parent.state != "released" and self.pool.num_blocks_for(extra) <= self.pool.num_free:
            self.leases.append(self.pool.fork(parent, self.fence(), num_shared, num_tokens))

    @precondition(lambda self: self.leases)
    @rule(data=st.data(), event=st.sampled_from(FAULTS))
    def end(self, data, event):
        self.pool.advance(data.draw(st.sampled_from(self.leases)), event)

    @invariant()
    def balances(self):
        self.pool.check()
        live = [lease for lease in self.leases if lease.state != "released"]
        assert self.pool.num_leased == len({block for lease in live for block in lease.blocks})

    def teardown(self):
        self.pool.release_all()
        assert self.pool.num_free == 12


TestPoolMachine = PoolMachine.TestCase
TestPoolMachine.settings = settings(max_examples=30, stateful_step_count=30)
