"""Step times that are drawn within the spread of a profile."""

from statistics import fmean, median

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sagellm.runtime.engine.costs.spread import (
    SHARES,
    StepSpread,
    StepVariation,
    check_spread,
)
from sagellm.runtime.engine.engine_model import EngineModel
from sagellm.runtime.engine.options import Limits
from sagellm.runtime.engine.step_cost import StepCost, Variation

RATIOS = (0.5, 0.8, 0.9, 0.95, 1.0, 1.1, 1.3, 1.5, 2.0)
SPREAD = (StepSpread(0.0, RATIOS), StepSpread(0.1, tuple(0.9 + 0.1 * one for one in RATIOS)))


def drawn(variation, expected_s=0.01, count=2000):
    draws = [variation.draw(number, expected_s) for number in range(count)]
    return [one.mean + one.distance for one in draws]


def test_draws_have_the_measured_quantiles():
    ratios = sorted(drawn(StepVariation(SPREAD, 1, "g/0")))
    for share, ratio in zip(SHARES, RATIOS, strict=True):
        assert ratios[int(share * len(ratios))] == pytest.approx(ratio, rel=0.05)
    assert (ratios[0], ratios[-1]) == (
        pytest.approx(0.5, abs=0.05),
        pytest.approx(2.0, abs=0.05),
    )


def test_the_mean_is_that_of_the_draws():
    variation = StepVariation(SPREAD, 1, "g/0")
    assert fmean(drawn(variation, count=20_000)) == pytest.approx(
        variation.draw(0, 0.0).mean, rel=0.01
    )


def test_draws_depend_on_seed_place_and_number_alone():
    same = [drawn(StepVariation(SPREAD, 1, "g/0"), count=50) for _ in range(2)]
    assert same[0] == same[1]
    assert drawn(StepVariation(SPREAD, 2, "g/0"), count=50) != same[0]
    assert drawn(StepVariation(SPREAD, 1, "g/1"), count=50) != same[0]
    backwards = StepVariation(SPREAD, 1, "g/0")
    assert [sum(backwards.draw(number, 0.01)[:2]) for number in (49, 7)] == [
        same[0][49],
        same[0][7],
    ]


def test_long_steps_have_their_own_spread():
    variation = StepVariation(SPREAD, 1, "g/0")
    short, long = drawn(variation, 0.0999), drawn(variation, 0.1)
    assert max(long) - min(long) == pytest.approx((max(short) - min(short)) / 10)
    assert median(short) == pytest.approx(1.0, abs=0.02)


def test_steps_of_a_run_that_vary_for_themselves_are_near_their_mean_together():
    apart, alike = Variation(1.0, 0.5, 0.0), Variation(1.0, 0.5, 1.0)
    assert apart.factor(1) == alike.factor(1) == alike.factor(100) == 1.5
    assert apart.factor(100) == pytest.approx(1.05)


@given(st.floats(0.1, 3.0), st.floats(0.0, 1.0), st.floats(0.0, 1.0), st.integers(1, 500))
def test_a_longer_run_takes_longer(mean, share, correlation, num_steps):
    """A run is cut where it was planned longer: its shorter time must come first."""
    one = Variation(mean, -share * mean, correlation)
    assert num_steps * one.factor(num_steps) <= (num_steps + 1) * one.factor(num_steps + 1) + 1e-9


@pytest.mark.parametrize(
    ("spread", "fault"),
    [
        ([StepSpread(0.0, (1.0,))], "1 ratios"),
        ([StepSpread(0.0, (*RATIOS[:-1], 0.1))], "do not fall"),
        ([StepSpread(0.0, (0.0, *RATIOS[1:]))], "positive"),
        ([StepSpread(0.0, RATIOS, 1.5)], "correlation"),
        ([StepSpread(0.1, RATIOS), StepSpread(0.1, RATIOS)], "does not rise"),
    ],
)
def test_quantiles_that_no_measurement_gives_are_refused(spread, fault):
    with pytest.raises(ValueError, match=fault):
        check_spread(spread)


def ends(variation, cut_s=None):
    """When two sequences end of which the second comes at `cut_s`, while the first decodes."""
    model = EngineModel(
        StepCost(0.01, 0.001), Limits(8, 512), num_blocks=100, block_size=16, variation=variation
    )
    model.submit(("a", 0), 0.0, num_prompt=10, num_output=50)
    if cut_s is not None:
        model.submit(("b", 0), cut_s, num_prompt=10, num_output=5)
    found = {}
    while model.next_at < float("inf"):
        for one in model.advance(model.next_at):
            if one.end:
                found[one.key[0]] = one.at_s
    return found, model


def test_an_engine_draws_the_times_of_its_runs():
    plain, _ = ends(None)
    varied, model = ends(StepVariation(SPREAD, 3, "g/0"))
    assert varied != plain
    assert varied == ends(StepVariation(SPREAD, 3, "g/0"))[0]
    assert varied != ends(StepVariation(SPREAD, 4, "g/0"))[0]
    assert model.busy_s == pytest.approx(varied["a"])


def test_a_run_that_is_cut_ends_at_a_step():
    """The prompt of the second is computed in a step of the first: no step is lost or added."""
    found, model = ends(StepVariation(SPREAD, 3, "g/0"), cut_s=0.2)
    assert 0.2 < found["b"] < found["a"]
    assert model.num_steps == 50


def test_an_engine_that_comes_back_draws_anew():
    _, model = ends(StepVariation(SPREAD, 3, "g/0"))
    assert model.emptied(9.0).num_changes == model.num_changes > 0
