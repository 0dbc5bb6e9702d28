"""What policies and admission meet, refuse and cost in simulated overload, in short runs."""

import pytest

from benchmarks.policies import (
    BACKGROUND,
    CRITICAL,
    POLICIES,
    attainments,
    overload,
    price,
    shedding,
    swing,
)


@pytest.mark.parametrize(
    ("lengths", "slo_ttft_s", "rate"),
    [
        ("different", 1.0, 5),
        pytest.param("different", 1.0, 8, marks=pytest.mark.soak),
        pytest.param("different", 4.0, 14, marks=pytest.mark.soak),
        ("alike", 4.0, 7),
    ],
)
def test_adaptive_is_within_5_percent_of_the_best(
    lengths: str, slo_ttft_s: float, rate: float
) -> None:
    found = attainments(lengths, slo_ttft_s, rate, number=500)
    assert set(found) == set(POLICIES)
    assert found["adaptive"] >= 0.95 * max(found.values())


@pytest.mark.soak
def test_cost_optimized_is_the_cheapest_at_equal_attainment() -> None:
    """90 % of the value of all requests is served in time."""
    rates = (6, 8, 9, 10, 11, 12)
    own = price("cost_optimized", 0.9, rates)
    others = [price(one, 0.9, rates) for one in POLICIES if one != "cost_optimized"]
    assert own.per_value < 0.9 * min(one.per_value for one in others)
    assert own.attained >= 0.9


@pytest.mark.parametrize("options", [{}, {"concurrency": "adaptive"}])
def test_ten_times_the_capacity_keeps_the_goodput(options: dict[str, str]) -> None:
    found = overload((1.0, 2.0, 10.0), seconds=30.0, **options)
    assert found[-1] >= 0.9 * max(found)


@pytest.mark.parametrize("seed", [1, 2])
def test_critical_requests_are_refused_only_while_all_others_are(seed: int) -> None:
    found = shedding(seconds=40.0, seed=seed)
    assert found.num_out_of_turn == 0
    assert found.refused[CRITICAL] > 50  # critical requests alone are 1.5 times the capacity
    assert found.refused[BACKGROUND] > 0.9 * (
        found.refused[BACKGROUND] + found.accepted[BACKGROUND]
    )


def test_the_current_decode_load_swings_and_the_predicted_one_does_not() -> None:
    """25 to 30 sequences decode within the objective."""
    current, predicted = swing("arrival", seconds=120), swing("prefill_end", seconds=120)
    assert current.least < 8
    assert current.most > 40
    assert current.num_good < 0.7 * current.num_served
    assert predicted.least > 12
    assert predicted.most < 30
    assert predicted.num_good == predicted.num_served
    assert predicted.num_good > 1.5 * current.num_good
