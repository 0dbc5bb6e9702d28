"""Buckets count as Prometheus does."""

import math

from sagellm.runtime.histograms import Buckets


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
