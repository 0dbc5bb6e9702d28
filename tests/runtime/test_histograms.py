"""Histograms: bounds count as in Prometheus, and quantiles are exact within one percent."""

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sagellm.runtime.containers import Buckets, LogHistogram


def test_a_bound_belongs_to_its_bucket() -> None:
    buckets = Buckets((1, 2, 5))
    for value in (0.5, 1, 1.5, 2, 5, 6):
        buckets.observe(value)
    assert list(buckets.cumulative()) == [(1, 2), (2, 4), (5, 5), (math.inf, 6)]
    assert buckets.total == 16
    assert buckets.num_samples == 6


def test_a_copy_changes_no_more() -> None:
    buckets = Buckets((1,))
    copied = buckets.copy()
    buckets.observe(0.5)
    assert copied.num_samples == 0
    assert copied.total == 0


def test_adding_takes_in_the_other() -> None:
    one, other = Buckets((1,)), Buckets((1,))
    one.observe(0.5)
    other.observe(3)
    one.add(other)
    assert one.counts == [1, 1]
    assert one.total == 3.5
    assert other.counts == [0, 1]


def filled(values: list[float]) -> Any:
    histogram = LogHistogram()
    for value in values:
        histogram = histogram.with_sample(value)
    return histogram


@given(st.lists(st.floats(1e-6, 1e4), min_size=1), st.sampled_from([0.0, 0.5, 0.9, 0.99, 1.0]))
def test_a_quantile_is_right_within_a_percent(values: list[float], share: float) -> None:
    exact = sorted(values)[max(math.ceil(share * len(values)), 1) - 1]
    assert filled(values).quantile(share) == pytest.approx(exact, rel=0.0101)


def test_no_time_at_all_is_a_sample() -> None:
    assert filled([0.0, 0.0, 1.0]).quantile(0.5) == 0.0
    assert filled([0.0]).num_samples == 1


def test_of_nothing_there_is_no_quantile() -> None:
    assert LogHistogram().quantile(0.5) is None
