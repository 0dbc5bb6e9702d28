import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sagellm.runtime.histograms import LogHistogram


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
