"""The capacity of replicas, against loads whose service times are known."""

import math

import pytest

from sagellm.runtime.capacity import PoolWork
from sagellm.runtime.port import EngineFacts, EngineLoad

FACTS = EngineFacts("m", 4096, 16, block_size=16, num_blocks=100)


def load(num_running=0, *, steps=0, leased=0, waiting=0):
    return EngineLoad(
        num_running=num_running,
        num_waiting=waiting,
        num_steps=steps,
        num_leased_blocks=leased,
        num_blocks=100,
    )


def served(pool, num_open, residence_s, *, seconds=100.0):
    """The pool after an interval in which one replica had `num_open` sequences all the time."""
    begun_s = pool.begun_s
    pool = pool.with_load(0, load(num_open), begun_s).closed(begun_s + 1e-9)
    for _ in range(round(num_open * seconds / residence_s)):
        pool = pool.with_served()
    return pool.closed(begun_s + seconds)


def test_littles_law_gives_the_residence():
    pool = served(PoolWork.opened(1, FACTS), 4, 2.0)
    assert pool.mean_open == pytest.approx(4.0)
    assert pool.served_at(4.0) == pytest.approx(2.0)  # 4 open sequences of 2 s each


def test_a_batch_of_another_size_counts_as_no_slower_until_it_was_measured():
    pool = served(PoolWork.opened(1, FACTS), 4, 2.0)
    assert pool.served_at(8.0) == pytest.approx(4.0)
    pool = served(pool, 8, 3.0)
    assert pool.served_at(8.0) == pytest.approx(8 / 3, rel=0.02)
    assert pool.served_at(12.0) == pytest.approx(12 / 4, rel=0.05)  # 0.25 s for each sequence more


def test_sequences_that_came_and_have_not_ended_count_half():
    pool = PoolWork.opened(1, FACTS).resumed(0.0)
    for second in range(10):  # one begins each second, the first eight end two seconds later
        pool = pool.with_load(0, load(min(second + 1, 2)), float(second))
    for _ in range(8):
        pool = pool.with_served()
    pool = pool.closed(10.0)
    assert pool.served_at(2.0) == pytest.approx(2 / (19 / 9), rel=0.01)


def test_nothing_is_known_before_eight_requests():
    pool = PoolWork.opened(1, FACTS).resumed(0.0).with_load(0, load(1), 0.0)
    for _ in range(6):
        pool = pool.with_served()
    assert pool.closed(10.0).served_at(4.0) is None


def test_the_batch_the_blocks_and_the_credit_bound_the_open_sequences():
    pool = PoolWork.opened(2, FACTS)
    assert pool.most_open(None, None) == 16
    assert pool.with_credit("prefill", 8.0).most_open(None, None) == 8
    assert PoolWork.opened(1, None).most_open(1.0, 1.0) == math.inf
    full = pool.with_load(0, load(5, leased=50), 1.0)
    assert full.most_open(None, None) == pytest.approx(9.5)  # 0.95 / (0.5 / 5)


def test_the_objectives_bound_the_open_sequences():
    pool = PoolWork.opened(1, FACTS)
    now, steps = 0.0, 0
    for num_open in (2, 10) * 20:  # steps of 10 ms, and 1 ms more for each sequence
        pool = pool.with_load(0, load(num_open, steps=steps), now)
        steps, now = steps + 10, now + 10 * (0.010 + 0.001 * num_open)
        pool = pool.with_load(0, load(num_open, steps=steps), now)
    assert pool.most_open(None, 0.018) == pytest.approx(8.0, rel=0.02)
    assert pool.most_open(None, 0.002) == 1.0  # unreachable, but one is always allowed
    assert not pool.is_slow(0.05)
    assert pool.is_slow(0.005)
    for num_open in (2, 10) * 20:
        pool = pool.with_load(0, load(num_open, steps=steps), now).with_first_token(
            0, num_open / 10
        )
    assert pool.most_open(0.5, None) == pytest.approx(5.0, rel=0.02)


def test_too_many_open_sequences_make_first_tokens_late():
    pool = PoolWork.opened(1, FACTS)
    for num_open in (2, 10) * 20:
        pool = pool.with_load(0, load(num_open), 0.0).with_first_token(0, num_open / 10)
    pool = pool.closed(1.0).closed(2.0)  # ten are open
    assert pool.is_crowded(0.5)
    assert not pool.is_crowded(1.5)
    assert not pool.is_crowded(0.05)  # one alone is late: more replicas would not help


def test_a_pool_is_full_if_every_replica_is():
    pool = PoolWork.opened(2, FACTS).with_load(0, load(3, leased=99), 0.0)
    assert not pool.is_full
    assert pool.with_load(1, load(3, leased=96), 0.0).is_full
    assert pool.with_health(1, 0.0, is_up=False).is_full


def test_replicas_come_go_and_are_lost():
    pool = PoolWork.opened(2, FACTS).with_load(1, load(4), 1.0)
    assert (pool.num_present, pool.num_up, pool.num_open) == (2, 2, 4)
    pool = pool.with_health(1, 3.0, is_up=False)
    assert (pool.num_up, pool.num_open, pool.replicas[1].down_s) == (1, 0, 3.0)
    pool = pool.with_health(1, 9.0, is_up=False)
    assert pool.replicas[1].down_s == 3.0
    pool = pool.with_replicas(frozenset({0, 1, 2}), 10.0)
    assert (pool.num_present, pool.num_up) == (3, 1)
    pool = pool.with_health(2, 11.0, is_up=True)
    assert pool.num_up == 2
    pool = pool.with_replicas(frozenset({0, 2}), 12.0)
    assert (pool.num_present, pool.num_up) == (2, 2)
    assert pool.with_load(1, load(4), 13.0) is pool
    assert pool.with_health(1, 13.0, is_up=True) is pool


def test_idle_time_is_no_step_time():
    pool = PoolWork.opened(1, FACTS).with_load(0, load(1, steps=10), 1.0)
    pool = pool.with_load(0, load(0, steps=20), 2.0)
    pool = pool.with_load(0, load(1, steps=21), 100.0)
    assert pool.replicas[0].step_s == pytest.approx(0.1)
    assert pool.steps.seconds_of(1, through_origin=False) == pytest.approx(0.1)
