"""Restarts: for ever, after pauses that double, with jitter; a healthy life resets them."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sagellm.runtime.cluster.child_process import RestartPolicy, Restarts


def died(restarts: Restarts, now: float, **fields: float | str | None) -> float:
    return restarts.died(now, **{"ready_s": None, "draw": 0.5, **fields})  # type: ignore[arg-type]


def test_delays_double_up_to_the_longest() -> None:
    restarts = Restarts()
    found = [died(restarts, float(now)) for now in range(8)]
    assert found == [0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 30.0, 30.0]
    assert restarts.count == 8


@given(st.floats(0, 1, exclude_max=True))
def test_a_delay_is_up_to_a_fifth_longer_or_shorter(draw: float) -> None:
    delay_s = died(Restarts(), 0.0, draw=draw)
    assert 0.4 <= delay_s <= 0.6


def test_after_more_than_five_deaths_in_a_minute_it_is_failing_and_tried_for_ever() -> None:
    restarts = Restarts()
    for now in (0.0, 10.0, 20.0, 30.0, 59.0):
        died(restarts, now)
        assert not restarts.is_failing
    assert all(died(restarts, 60.0 * n) <= 36.0 for n in range(1, 2000))
    assert restarts.is_failing
    assert restarts.count == restarts.deaths["machine"] == 2004


def test_deaths_of_long_ago_do_not_count() -> None:
    restarts = Restarts()
    for n in range(50):
        died(restarts, 20.0 * n)
    assert not restarts.is_failing


@pytest.mark.parametrize(("lived_s", "is_failing"), [(59.0, True), (60.0, False)])
def test_a_healthy_life_ends_a_failing_one(lived_s: float, is_failing: bool) -> None:
    restarts = Restarts(RestartPolicy(most=0))
    died(restarts, 0.0)
    restarts.note_uptime(lived_s)
    assert restarts.is_failing == is_failing


def test_a_death_that_a_request_caused_makes_no_pause_longer() -> None:
    restarts = Restarts()
    found = [died(restarts, n, blame="request") for n in range(20)]
    assert set(found) == {0.5}
    assert not restarts.is_failing
    assert died(restarts, 20.0) == 0.5
    assert restarts.deaths == {"request": 20, "machine": 1}


@pytest.mark.parametrize(("lived_s", "delay_s"), [(59.0, 1.0), (60.0, 0.5)])
def test_a_healthy_life_begins_anew(lived_s: float, delay_s: float) -> None:
    restarts = Restarts()
    died(restarts, 0.0)
    assert died(restarts, 100.0, ready_s=100.0 - lived_s) == delay_s


def cut(restarts: Restarts, now: float, **fields: object) -> float:
    given: dict[str, Any] = {"ready_s": None, "draw": 0.5, "may_eject": True, **fields}
    return restarts.cut(now, **given)


def test_after_five_cuts_in_a_row_it_is_left_alone_longer_each_time() -> None:
    restarts = Restarts()
    assert [cut(restarts, float(now)) for now in range(7)] == [0.5, 1.0, 2.0, 4.0, 10.0, 20.0, 30.0]
    assert restarts.is_ejected
    assert max(cut(restarts, 8.0) for _ in range(2000)) == 300.0
    assert cut(restarts, 100.0, ready_s=40.0) == 0.5
    assert not restarts.is_ejected


def test_where_it_is_needed_it_is_tried_again_as_any_other_and_never_given_up() -> None:
    restarts = Restarts()
    found = [cut(restarts, now / 10, may_eject=False) for now in range(2000)]
    assert found[:9] == [0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 30.0, 30.0, 30.0]
    assert set(found[9:]) == {30.0}
    assert not restarts.is_ejected


def test_a_death_between_begins_a_new_row_of_cuts() -> None:
    restarts = Restarts()
    for now in range(4):
        cut(restarts, float(now))
    died(restarts, 4.0)
    cut(restarts, 5.0)
    assert not restarts.is_ejected


def test_a_cut_is_no_death() -> None:
    restarts = Restarts(RestartPolicy(most=1))
    cut(restarts, 0.0)
    died(restarts, 1.0)
    assert not restarts.is_failing
    died(restarts, 2.0)
    assert restarts.is_failing
    assert restarts.deaths == {"link": 1, "machine": 2}


def test_what_is_forgiven_counts_no_more() -> None:
    restarts = Restarts(RestartPolicy(most=1))
    died(restarts, 0.0)
    died(restarts, 1.0)
    assert restarts.is_failing
    restarts.reset_backoff()
    assert not restarts.is_failing
    assert died(restarts, 2.0) == 0.5
    for now in range(3, 10):
        cut(restarts, float(now))
    restarts.reset_backoff()
    assert cut(restarts, 10.0) == 0.5
