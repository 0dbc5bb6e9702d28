"""What requests take, by their tokens."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sagellm.runtime.feedback import LineFit

SAMPLES = st.lists(
    st.tuples(st.integers(0, 10_000), st.floats(0, 100, allow_subnormal=False)), min_size=1
)


def fitted(*samples: tuple[float, float]) -> LineFit:
    fit = LineFit()
    for num_tokens, seconds in samples:
        fit = fit.with_samples(num_tokens, seconds)
    return fit


def test_samples_on_a_line_give_that_line() -> None:
    fit = fitted((0, 1.0), (100, 2.0), (200, 3.0))
    assert fit.seconds_of(300) == pytest.approx(4.0)
    assert fit.seconds_of(300, 2) == pytest.approx(2 * 1.0 + 3.0)


def test_samples_of_one_size_are_proportional() -> None:
    fit = fitted((100, 1.0), (101, 3.0))
    assert fit.seconds_of(50) == pytest.approx(1.0, rel=0.02)


def test_what_takes_no_longer_with_more_tokens_is_flat() -> None:
    fit = fitted(*[(10, 0.3), (1000, 0.2)] * 8)
    assert fit.seconds_of(0) == fit.seconds_of(5000) == pytest.approx(0.25)


def test_equal_samples_may_come_together() -> None:
    assert LineFit().with_samples(30, 6.0, count=3) == fitted(*[(10, 2.0)] * 3)


def test_older_samples_count_less() -> None:
    fit = fitted((10, 5.0)).with_samples(10, 1.0, kept=0.0)
    assert fit.seconds_of(10) == pytest.approx(1.0)


@given(SAMPLES, st.integers(0, 10_000), st.integers(0, 10_000))
def test_the_line_never_falls_and_is_never_negative(
    samples: list[tuple[int, float]], one: int, other: int
) -> None:
    fit = fitted(*samples)
    low, high = sorted((one, other))
    assert -1e-6 <= fit.seconds_of(low) <= fit.seconds_of(high) + 1e-6
