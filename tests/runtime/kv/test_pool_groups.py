"""The pool over several KV groups: windows slide, states are kept, and the ledger adds up."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from sagellm.runtime.kv.lease import FAULTS, FREED, Fence
from sagellm.runtime.kv.pool import BlockPool
from sagellm.runtime.kv.prefix_tree import block_key
from sagellm.runtime.lease_shape import LeaseShape, TokenGroup

FULL, WINDOW, WIDE = TokenGroup(), TokenGroup(2, 6), TokenGroup(1, 11)
SHAPES = {
    "hybrid": LeaseShape(4, (FULL, WINDOW), num_state_blocks=2, max_ahead=8),
    "windows": LeaseShape(4, (WINDOW, WIDE), max_ahead=8),
    "states": LeaseShape(4, (), num_state_blocks=1, max_ahead=8),
}
A, B = Fence("a", 0, 0), Fence("b", 0, 0)


def key_path(size, token_id, count):
    """The keys of the first `count` blocks of a sequence that repeats one token."""
    keys = [None]
    for _ in range(count):
        keys.append(block_key(keys[-1], [token_id] * size, ""))
    return keys[1:]


def test_a_window_holds_what_is_read_and_what_comes_next():
    shape = SHAPES["hybrid"]
    assert shape.spans(100, 0) == [(0, 25), (0, 5)]  # ceil((6 + 8) / 4) + 1
    assert shape.spans(100, 40) == [(0, 25), (8, 13)]  # position 40 sees 35 ... 40
    assert shape.spans(42, 42) == [
        (0, 11),
        (9, 11),
    ]  # the blocks of 42 tokens that a transfer copies
    assert shape.num_blocks(100) == 25 + 2 * 5 + 2
    assert shape.num_needed(100) == 25 + 2 * 5 + 2 * 2
    assert shape.num_tokens(25 + 2 * 5 + 2 * 2, 1000) == 100
    assert LeaseShape(4).num_blocks(100) == LeaseShape(4).num_needed(100) == 25


def lease_of(pool, num_tokens, num_computed, fence=A):
    lease = pool.reserve(fence, num_tokens)
    pool.grow(lease, num_tokens)
    pool.publish(lease, key_path(4, 1, num_computed // 4))
    pool.free_unread(lease, num_computed)
    return lease


def test_blocks_behind_a_window_are_given_back():
    pool = BlockPool(60, 4, keeps_prefixes=False, shape=SHAPES["hybrid"])
    lease = lease_of(pool, 40, 32)
    assert [table.count(FREED) for table in lease.tables] == [0, 6, 6]  # 32 sees 27 ... 32
    assert pool.num_leased == 10 + 2 * 4 + 2
    pool.check()


def test_what_slid_out_of_a_window_is_kept_for_others_until_blocks_run_out():
    pool = BlockPool(60, 4, shape=SHAPES["windows"])
    lease = lease_of(pool, 40, 40)
    pool.advance(lease, "finish")
    assert pool.num_cached == 30
    path = []
    for key in key_path(4, 1, 10):
        path.append(pool.child(path[-1] if path else None, key))
    assert pool.num_reusable(path) == 10
    pool.reserve(B, 40)
    pool.reserve(Fence("c", 0, 0), 40)
    assert pool.num_evicted > 0
    assert pool.num_reusable(path) == 10
    assert pool.num_reusable(path[:1]) == 0  # the oldest went first
    pool.check()


def test_a_prefix_ends_where_its_state_is_kept():
    pool = BlockPool(60, 4, shape=SHAPES["hybrid"])
    lease = pool.reserve(A, 40)
    pool.publish(lease, key_path(4, 1, 5))
    pool.free_unread(lease, 20)
    assert pool.num_reusable(lease.path) == 0
    kept = lease.state_blocks
    pool.keep_state(lease, 20)
    assert lease.state_at(20) == kept != lease.state_blocks
    assert pool.num_reusable(lease.path) == 0  # no step has begun there: the state may be written
    pool.grow(lease, 28)
    pool.publish(lease, key_path(4, 1, 7)[5:])
    pool.free_unread(lease, 28)
    assert pool.num_reusable(lease.path) == 5
    other = pool.reserve(B, 40, prefix=lease.path[:5])
    assert other.state_at(20) == kept
    assert other.state_blocks != kept
    assert other.tables[0][:5] == lease.tables[0][:5]
    assert other.tables[1][:3] == [FREED] * 3
    pool.check()


def test_blocks_are_sent_in_one_order_with_the_state_at_the_end():
    pool = BlockPool(60, 4, shape=SHAPES["hybrid"])
    lease = lease_of(pool, 30, 30)
    lease.num_tokens = 30
    full, *windows = lease.tables
    assert pool.sent(lease) == [*full, *windows[0][6:], *windows[1][6:], *lease.state_blocks]
    assert pool.sent(lease, first=5) == pool.sent(lease)[5:]
    reservation = pool.reserve(B, 30, "transfer", start=30)
    assert len(pool.sent(reservation)) == len(pool.sent(lease))
    assert pool.full_blocks(lease, 2, 4) == full[2:4]


class GroupsMachine(RuleBasedStateMachine):
    """Sequences of three kinds are begun, computed, grown and ended in any order."""

    shape = SHAPES["hybrid"]
    keeps_prefixes = True

    def __init__(self):
        super().__init__()
        self.pool = BlockPool(64, 4, keeps_prefixes=self.keeps_prefixes, shape=self.shape)
        self.leases = {}  # lease -> token that it repeats, tokens computed
        self.number = 0

    @rule(num_tokens=st.integers(1, 40), token_id=st.integers(0, 2), priority=st.integers(0, 4))
    def reserve(self, num_tokens, token_id, priority):
        path = []
        for key in key_path(4, token_id, (num_tokens - 1) // 4):
            node = self.pool.child(path[-1] if path else None, key)
            if node is None:
                break
            path.append(node)
        prefix = path[: self.pool.num_reusable(path)]
        wanted, before = self.pool.num_blocks_needed(num_tokens, prefix), self.pool.num_available
        if wanted > before:
            return
        self.number += 1
        fence = Fence("r", self.number, 0)
        lease = self.pool.reserve(fence, num_tokens, prefix=prefix, priority=priority)
        assert self.pool.num_available == before - wanted
        self.leases[lease] = token_id, len(prefix) * 4

    @precondition(lambda self: self.leases)
    @rule(data=st.data(), count=st.integers(1, 4), keeps=st.booleans())
    def compute(self, data, count, keeps):
        lease = data.draw(st.sampled_from(list(self.leases)))
        token_id, start = self.leases[lease]
        pool, size = self.pool, self.shape.num_state_blocks
        if pool.num_blocks_missing(lease, start + count) > pool.num_available:
            return
        if start + count > lease.capacity:
            pool.grow(lease, start + count)
        is_due = keeps and size and self.keeps_prefixes and start and start % 4 == 0
        if is_due and lease.state_at(start) is lease.state_blocks and pool.num_available >= size:
            pool.keep_state(lease, start)
        keys = key_path(4, token_id, (start + count) // 4)[len(lease.path) :]
        if not lease.path or lease.path[-1].is_live:
            pool.publish(lease, keys)
        pool.free_unread(lease, start + count)
        self.leases[lease] = token_id, start + count

    @precondition(lambda self: self.leases)
    @rule(data=st.data(), event=st.sampled_from(FAULTS))
    def end(self, data, event):
        lease = data.draw(st.sampled_from(list(self.leases)))
        del self.leases[lease]
        self.pool.advance(lease, event)

    @invariant()
    def balances(self):
        self.pool.check()
        held = {block for lease in self.leases for block in lease.blocks}
        assert self.pool.num_leased == len(held)
        for lease, (_, computed) in self.leases.items():
            assert len(lease.state_blocks) == self.shape.num_state_blocks
            groups = [group for group in self.shape.groups for _ in range(group.num_tables)]
            for group, table in zip(groups, lease.tables, strict=True):
                first = self.shape.first(group, computed)
                assert table[:first] == [FREED] * first
                assert FREED not in table[first:]

    def teardown(self):
        for lease in list(self.leases):
            self.pool.advance(lease, "finish")
        self.pool.check()
        assert self.pool.num_leased == 0
        self.pool.release_all()
        assert self.pool.num_free == 64


class UnkeptMachine(GroupsMachine):
    keeps_prefixes = False


class WindowsMachine(GroupsMachine):
    shape = SHAPES["windows"]


class StatesMachine(GroupsMachine):
    shape = SHAPES["states"]


@pytest.mark.parametrize("machine", [GroupsMachine, UnkeptMachine, WindowsMachine, StatesMachine])
def test_any_order_keeps_the_ledger(machine):
    case = machine.TestCase()
    case.settings = settings(max_examples=25, stateful_step_count=30)
    case.runTest()
