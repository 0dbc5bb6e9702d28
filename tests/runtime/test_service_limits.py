"""Limits of the requests in service: adaptive concurrency by properties, and the decode limit."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sagellm.runtime.feedback import FirstToken
from sagellm.runtime.operator import Setup
from sagellm.runtime.service_limits import ConcurrencyLimit, ServiceOptions, service_of


def first(since_s, slo_ttft_s=1.0):
    return FirstToken(seconds=since_s, since_arrival_s=since_s, slo_ttft_s=slo_ttft_s)


def played(limit, seconds, *, every_s=0.1, begin_s=0.0):
    """The limit after first tokens at regular times, while all of it is in use."""
    now = begin_s
    for since_s in seconds:
        now += every_s
        limit = limit.after(first(since_s), 1.0, int(limit.limit), now)
    return limit


@given(
    st.integers(1, 50),
    st.integers(0, 200),
    st.lists(st.tuples(st.floats(0, 10), st.integers(0, 300)), max_size=200),
)
def test_the_limit_stays_between_its_bounds(least, more, tokens):
    limit, again = (ConcurrencyLimit.between(least, least + more) for _ in range(2))
    for number, (since_s, num_open) in enumerate(tokens):
        limit = limit.after(first(since_s), 1.0, num_open, number * 0.1)
        assert least <= limit.limit <= least + more
    for number, (since_s, num_open) in enumerate(tokens):
        again = again.after(first(since_s), 1.0, num_open, number * 0.1)
    assert again == limit  # equal reports, equal limits


def test_it_doubles_in_each_round_until_the_first_late_token():
    limit = ConcurrencyLimit.between(8, 1000)
    assert played(limit, [0.5] * 8).limit == 16
    assert played(limit, [0.5] * 24).limit == 32


def test_after_a_late_token_it_grows_by_one_in_a_round():
    limit = played(ConcurrencyLimit.between(8, 1000), [0.5] * 92)
    assert limit.limit == 100
    limit = played(limit, [2.0], begin_s=100.0)
    assert limit.limit == pytest.approx(90)
    limit = played(limit, [0.5] * 90, begin_s=101.0)
    assert limit.limit == pytest.approx(91, abs=0.01)


def test_one_burst_lowers_it_once():
    """All of these requests arrived before the first of them was late."""
    limit = played(ConcurrencyLimit.between(8, 1000), [0.5] * 92)
    for number in range(50):
        limit = limit.after(first(2.0), 1.0, 100, 100.0 + number * 0.01)
    assert limit.limit == pytest.approx(90)
    assert limit.after(first(1.5), 1.0, 100, 102.0).limit == pytest.approx(81)


def test_it_recovers_after_a_burst():
    limit = played(ConcurrencyLimit.between(8, 1000), [0.5] * 92)
    low = played(limit, [5.0] * 1000, begin_s=100.0)  # every five seconds one decrease
    assert low.limit < 0.2 * limit.limit
    assert low.limit >= 8
    assert played(low, [0.5] * 5000, begin_s=300.0).limit >= limit.limit


def test_what_is_not_used_does_not_grow():
    limit = ConcurrencyLimit.between(10, 100)
    assert limit.after(first(0.1), 1.0, 4, 1.0) is limit
    assert limit.after(first(0.1), 1.0, 5, 1.0).limit == 11


def test_resumed_and_patient_requests_show_nothing():
    limit = ConcurrencyLimit.between(10, 100)
    assert limit.after(FirstToken(seconds=9.0), 1.0, 10, 1.0) is limit
    assert limit.after(first(9.0, slo_ttft_s=20.0), 1.0, 10, 1.0) is limit
    assert limit.after(first(9.0, slo_ttft_s=0.5), 1.0, 10, 1.0).limit == 10  # the least
    assert limit.after(first(9.0, slo_ttft_s=0.5), 1.0, 10, 1.0).lowered_s == 1.0


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"load_at": "arrival"}, "load_at=arrival has no effect"),
        ({"min_concurrency": 9}, "min_concurrency has no effect: add concurrency: adaptive"),
        ({"max_concurrency": 9}, "max_concurrency has no effect: add concurrency: adaptive"),
        ({"concurrency": "adaptive"}, "slo_ttft_s: give this objective"),
        (
            {"concurrency": "adaptive", "slo_ttft_s": 1.0, "max_concurrency": 7},
            "min_concurrency=8 is above max_concurrency=7",
        ),
    ],
)
def test_options_without_effect_are_refused(options, words):
    with pytest.raises(ValueError, match=words):
        service_of(ServiceOptions(**options), Setup("door"))


def test_without_a_limit_nothing_is_kept():
    assert service_of(ServiceOptions(slo_ttft_s=1.0), Setup("door")) is None
