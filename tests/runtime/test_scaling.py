"""The rule of autoscaling, decision by decision."""

import math
from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec import structs

from sagellm.graphs.sections import ReplicaBounds
from sagellm.runtime.capacity import PoolWork
from sagellm.runtime.port import EngineFacts, EngineLoad
from sagellm.runtime.scaling import EngineScaling, Need, ScalingRule, Signs, need_of

FACTS = EngineFacts("m", 4096, 8, block_size=16, num_blocks=100)
RULE = ScalingRule(1.0, None, 0.8, 0.6, 10.0, 60.0, 30.0)
BOUNDS = ReplicaBounds(max=8, min=1, start_s=20.0, requests_per_s=2.0)
CALM = Signs(0.0, 0.0, is_late=False)
LITTLE = Need(1, "demand", 1)


def pool_of(num_up, num_down=0, *, open_each=0, leased=0, down_s=0.0):
    pool = PoolWork.opened(num_up + num_down, FACTS)
    load = EngineLoad(num_running=open_each, num_leased_blocks=leased, num_blocks=100)
    for number in range(num_up):
        pool = pool.with_load(number, load, 0.0)
    for number in range(num_up, num_up + num_down):
        pool = pool.with_health(number, down_s, is_up=False)
    return pool


@pytest.mark.parametrize(
    ("per_s", "up", "keep"),
    [(0.0, 1, 1), (1.59, 1, 2), (1.61, 2, 2), (3.19, 2, 3), (16.0, 10, 14)],
)
def test_replicas_for_a_demand(per_s, up, keep):
    # One serves 2 requests a second: 1.6 at the target, and 1.2 after a removal.
    assert need_of(pool_of(2), CALM._replace(per_s=per_s), BOUNDS, RULE) == (up, "demand", keep)


def test_those_that_will_wait_are_served_within_the_cool_down():
    signs = Signs(4.0, 9.0, is_late=False, num_waiting=60.0, start_s=30.0)
    # One replica serves 2 a second: after 30 s, 120 wait. So 2 a second more for 60 s.
    assert need_of(pool_of(1), signs, BOUNDS, RULE).up == 4  # 6 / 1.6
    assert need_of(pool_of(4), signs, BOUNDS, RULE).up == 3  # none will wait any more
    assert need_of(pool_of(1), signs._replace(num_waiting=0.0), BOUNDS, RULE).up == 3


def test_an_unknown_capacity_asks_for_nothing():
    bounds = replace(BOUNDS, requests_per_s=None)
    assert need_of(pool_of(1), CALM._replace(per_s=99.0), bounds, RULE) == (1, "demand", 1)


def test_open_sequences_keep_replicas():
    # 4 x 5 of 8 are open: 0.6 of 8 is 4.8, which 20 sequences fill five times.
    found = need_of(pool_of(4, open_each=5), CALM, BOUNDS, RULE)
    assert (found.up, found.keep) == (1, 5)


@pytest.mark.parametrize("num_up", [1, 3])
def test_late_first_tokens_ask_for_one_more(num_up):
    found = need_of(pool_of(num_up), Signs(0.0, 5.0, is_late=True), BOUNDS, RULE)
    assert found == (num_up + 1, "ttft", num_up + 1)


def test_a_demand_for_more_comes_before_one_more():
    signs = Signs(8.0, 5.0, is_late=True)
    assert need_of(pool_of(2), signs, BOUNDS, RULE)[:2] == (5, "demand")


def test_slow_steps_and_full_pools_ask_for_one_more():
    pool = pool_of(1, open_each=2)
    slow = pool.with_load(0, EngineLoad(num_running=2, num_steps=10), 1.0)
    rule = replace(RULE, slo_tpot_s=0.05)
    assert need_of(slow, CALM, BOUNDS, rule)[:2] == (2, "tpot")
    full = pool_of(2, open_each=2, leased=98)
    assert need_of(full, Signs(0.0, 0.3, is_late=False), BOUNDS, RULE)[:2] == (3, "kv")
    assert need_of(full, CALM, BOUNDS, RULE).up == 1  # full, but nobody waits


def test_a_wait_near_the_objective_keeps_replicas():
    # With one of three replicas less, 0.41 s would be 0.615 s: above 0.6 of the objective.
    assert need_of(pool_of(3), Signs(0.0, 0.41, is_late=False), BOUNDS, RULE).keep == 3
    assert need_of(pool_of(3), Signs(0.0, 0.39, is_late=False), BOUNDS, RULE).keep == 1


def decided(scaling, pool, need, now, bounds=BOUNDS):
    return scaling.decide(pool, need, bounds, RULE, now)


def test_a_predicted_demand_adds_all_replicas_at_once():
    scaling, change = decided(EngineScaling(20.0), pool_of(2), Need(6, "demand", 6), 5.0)
    assert change == (6, "demand")
    assert (scaling.pending_s, scaling.is_more) == (5.0, True)


def test_nothing_changes_while_a_change_is_under_way():
    scaling, _ = decided(EngineScaling(20.0), pool_of(1), Need(2, "ttft", 2), 0.0)
    _, change = decided(scaling, pool_of(1), Need(8, "demand", 8), 10.0)
    assert change is None
    ended = scaling.ended("", RULE, 30.0)
    assert ended.start_s == 25.0  # the mean of 20 s and 30 s
    assert decided(ended, pool_of(2), Need(8, "demand", 8), 30.0)[1] == (8, "demand")


@pytest.mark.parametrize(("count", "to"), [(1, 3), (9, 6)])
def test_a_number_outside_of_the_bounds_is_brought_back(count, to):
    bounds = ReplicaBounds(max=6, min=3)
    assert decided(EngineScaling(1.0), pool_of(count), LITTLE, 0.0, bounds)[1] == (to, "bounds")


def test_the_bounds_hold():
    assert decided(EngineScaling(1.0), pool_of(7), Need(99, "demand", 99), 0.0)[1] == (8, "demand")
    assert decided(EngineScaling(1.0), pool_of(8), Need(99, "demand", 99), 0.0)[1] is None
    assert decided(EngineScaling(1.0), pool_of(1), LITTLE, 1e6)[1] is None


def test_a_removal_must_have_been_possible_for_the_whole_window():
    scaling = EngineScaling(20.0, since_s=0.0)
    for now in (10.0, 20.0, 30.0, 40.0, 50.0):
        scaling, change = decided(scaling, pool_of(3), LITTLE, now)
        assert change is None
    scaling, change = decided(scaling, pool_of(3), Need(1, "demand", 3), 60.0)  # once all three
    assert change is None
    for now in (70.0, 120.0):
        scaling, change = decided(scaling, pool_of(3), LITTLE, now)
        assert change is None
    scaling, change = decided(scaling, pool_of(3), LITTLE, 120.1)
    assert change == (2, "idle")
    # The next removal needs no window of its own: two would have been enough all the time.
    scaling = scaling.ended("", RULE, 125.0)
    assert decided(scaling, pool_of(2), LITTLE, 130.0)[1] == (1, "idle")


def test_a_start_begins_the_window_anew():
    scaling, _ = decided(EngineScaling(20.0), pool_of(1), Need(2, "ttft", 2), 100.0)
    scaling = scaling.ended("", RULE, 120.0)
    assert decided(scaling, pool_of(2), LITTLE, 179.0)[1] is None
    assert decided(scaling, pool_of(2), LITTLE, 181.0)[1] == (1, "idle")


def test_regretted_removals_make_the_next_ones_later_and_are_forgiven():
    scaling, now, windows = EngineScaling(20.0, since_s=-1e9), 0.0, []
    for _ in range(5):  # removed, and needed again 10 s later
        scaling, change = decided(scaling, pool_of(2), LITTLE, now)
        assert change == (1, "idle")
        scaling = scaling.ended("", RULE, now)
        scaling, change = decided(scaling, pool_of(1), Need(2, "ttft", 2), now + 10)
        assert change == (2, "ttft")
        scaling = scaling.ended("", RULE, now + 10)
        windows.append(scaling.window_s(RULE))
        now += 10 + windows[-1] + 1
        scaling = structs.replace(scaling, needs=())
    assert windows == [120.0, 240.0, 480.0, 480.0, 480.0]
    scaling, change = decided(scaling, pool_of(2), LITTLE, now + 16 * 60.0)
    assert change == (1, "idle")
    assert scaling.window_s(RULE) == 60.0


def test_failed_starts_are_tried_again_later_and_later():
    scaling, now, pauses = EngineScaling(20.0), 0.0, []
    for _ in range(8):
        scaling, change = decided(scaling, pool_of(1), Need(2, "ttft", 2), now)
        assert change == (2, "ttft")
        scaling = scaling.ended("engine g[1]: exit code 1", RULE, now)
        assert scaling.start_s == 20.0  # a failed start says nothing of how long one takes
        assert decided(scaling, pool_of(1), Need(2, "ttft", 2), scaling.retry_at_s - 0.1)[1] is None
        pauses.append(scaling.retry_at_s - now)
        now = scaling.retry_at_s
    assert pauses == [30.0, 60.0, 120.0, 240.0, 480.0, 960.0, 960.0, 960.0]
    scaling, _ = decided(scaling, pool_of(1), Need(2, "ttft", 2), now)
    assert scaling.ended("", RULE, now).num_failures == 0


def test_a_replica_that_stays_down_gets_one_substitute_and_no_more():
    scaling, need = EngineScaling(20.0), Need(3, "ttft", 3)
    assert decided(scaling, pool_of(1, 1, down_s=100.0), need, 139.0)[1] is None  # it may come back
    assert decided(scaling, pool_of(1, 1, down_s=100.0), need, 141.0)[1] == (3, "ttft")
    assert decided(scaling, pool_of(1, 2, down_s=100.0), need, 1e6)[1] is None


def test_a_replica_that_is_down_goes_first():
    scaling = EngineScaling(20.0, since_s=-1e9)
    assert decided(scaling, pool_of(2, 1), Need(1, "demand", 2), 0.0)[1] == (2, "idle")
    assert decided(scaling, pool_of(2, 1), Need(1, "demand", 3), 0.0)[1] is None


NEEDS = st.tuples(st.integers(1, 12), st.integers(1, 12))


@given(
    st.integers(1, 4),
    st.integers(0, 4),
    st.lists(st.tuples(NEEDS, st.sampled_from(["end", "fail", "wait"])), max_size=80),
)
def test_any_needs_keep_the_number_in_bounds_and_one_change_at_a_time(least, more, events):
    bounds = ReplicaBounds(max=least + more, min=least)
    scaling, count, wanted, now = EngineScaling(20.0), least, None, 0.0
    for (up, keep), event in events:
        now += RULE.interval_s
        need = Need(up, "demand", max(up, keep))
        scaling, change = decided(scaling, pool_of(count), need, now, bounds)
        if change is not None:
            assert wanted is None
            assert bounds.min <= change.num_replicas <= bounds.max
            assert change.num_replicas - count in (-1, *range(1, more + 1))
            wanted = change.num_replicas
        if wanted is not None and event != "wait":
            scaling = scaling.ended("no memory" if event == "fail" else "", RULE, now)
            count, wanted = (count if event == "fail" else wanted), None
    assert len(scaling.needs) <= scaling.window_s(RULE) / RULE.interval_s + 1


@given(st.lists(st.sampled_from([LITTLE, Need(2, "ttft", 2)]), min_size=400, max_size=400))
def test_an_adversary_gets_few_changes_of_direction(needs):
    scaling, count, now, directions = EngineScaling(20.0), 1, 0.0, []
    for need in needs:
        now += RULE.interval_s
        scaling, change = decided(scaling, pool_of(count), need, now)
        if change is not None:
            directions.append(change.num_replicas > count)
            count, scaling = change.num_replicas, scaling.ended("", RULE, now)
    turns = sum(a != b for a, b in pairwise(directions))
    # Windows of 60, 120 and 240 s, and then of 480 s: two turns each.
    assert turns <= 6 + 2 * math.ceil(now / 480.0)
