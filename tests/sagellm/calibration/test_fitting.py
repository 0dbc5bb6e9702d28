"""The fit of a step's cost to measured steps, and their spread."""

from random import Random

import numpy as np
import pytest

from sagellm.calibration.fitting import fit, is_next, line, nonnegative, spread
from sagellm.runtime.engine.costs.fitted import FittedCost, FittedForm
from sagellm.runtime.engine.costs.spread import SHARES, check_spread
from sagellm.runtime.engine.step_cost import StepShape, step_shape

TRUE = FittedForm(
    1e-3,
    (0.0, 64.0, 512.0),
    (0.0, 2e-3, 9e-3),
    1e-7,
    (0.0, 8192.0, 40_000.0),
    (0.0, 4e-3, 36e-3),
    5e-5,
    2e-4,
    3e-4,
)
MIDDLE = SHARES.index(0.5)


def shapes(batches, contexts, prefills):
    for batch in batches:
        for context in contexts:
            yield step_shape([(context, 1, 1)] * batch)
    for count in prefills:
        for start in (0, 200, 900):
            yield step_shape([(start, count, start + count)])
            yield step_shape([(start, count, start + count), *[(300, 1, 1)] * 8])


SEEN = tuple(shapes((1, 2, 4, 8, 16, 32, 64), (16, 100, 300, 1500), (2, 8, 16, 64, 128, 256, 512)))
UNSEEN = tuple(shapes((3, 20, 48), (100, 700), (30, 90, 400)))


def measured(seen, noise=lambda: 1.0):
    cost = FittedCost.of(TRUE)
    return [(shape, cost.seconds(shape) * noise()) for shape in seen]


def worst(found, steps):
    cost = FittedCost.of(found)
    return max(abs(cost.seconds(shape) / seconds - 1) for shape, seconds in steps)


def test_a_fit_predicts_steps_that_it_has_not_seen():
    assert worst(fit(measured(SEEN)), measured(UNSEEN)) < 0.03


def test_a_fit_finds_the_coefficients():
    found = fit(measured(SEEN))
    for name in ("step_s", "row_s", "prefill_pair_s", "prefill_step_s", "mixed_step_s"):
        assert getattr(found, name) == pytest.approx(getattr(TRUE, name), rel=0.1), name


def test_a_few_late_steps_do_not_move_a_fit():
    """One step in ten takes four times as long: least squares would be 30 % off."""
    draw = Random(1)
    late = measured(SEEN * 8, lambda: 4.0 if draw.random() < 0.1 else draw.uniform(0.97, 1.03))
    assert worst(fit(late), measured(UNSEEN)) < 0.1


def test_no_coefficient_is_negative():
    falling = [(StepShape(0, 0, batch, 100), 1.0 / batch) for batch in (1, 2, 4)]
    found = fit(falling)
    assert min(found.step_s, found.row_s, *found.context_seconds, *found.token_seconds) >= 0


def test_a_fit_goes_on_beyond_what_was_measured():
    """The last segment is wide: two near points would say nothing of its slope."""
    found = fit(measured(shapes((1, 8, 64), (16, 140), (2, 520))))
    assert found.tokens[-1] >= 1.5 * found.tokens[-2]
    assert found.contexts[-1] >= 1.5 * found.contexts[-2]


def test_least_squares_above_zero():
    """Without the bound, the second would be -1: the first then takes the mean."""
    found = nonnegative(np.array([[1.0, 0.0], [1.0, 1.0]]), np.array([2.0, 1.0]))
    assert found == pytest.approx([1.5, 0.0])


def test_a_line_is_found_among_outliers():
    points = [(x, 2.0 + 0.5 * x) for x in range(1, 40)] + [(5, 60.0), (30, 90.0)]
    assert line(points) == pytest.approx((2.0, 0.5), rel=0.02)


def test_nothing_is_fitted_to_nothing():
    with pytest.raises(ValueError, match="no step"):
        fit([])


def test_short_and_long_steps_have_a_spread_of_their_own():
    draw = Random(2)
    short = [step_shape([(50, 1, 1)])] * 400
    long = [step_shape([(0, 512, 512)])] * 400
    noise = [draw.uniform(0.5, 1.5) for _ in short] + [draw.uniform(0.95, 1.05) for _ in long]
    steps = [(s, t * n) for (s, t), n in zip(measured([*short, *long]), noise, strict=True)]
    found = spread(TRUE, steps)
    check_spread(found)
    wide, narrow = found
    assert (wide.ratios[0], wide.ratios[-1]) == (
        pytest.approx(0.5, abs=0.05),
        pytest.approx(1.5, abs=0.05),
    )
    assert narrow.ratios[MIDDLE] == pytest.approx(1.0, abs=0.01)
    assert narrow.ratios[-1] < 1.06
    assert 0 < narrow.from_s <= FittedCost.of(TRUE).seconds(long[0])


@pytest.mark.parametrize(("is_alike", "expected"), [(True, 1.0), (False, 0.0)])
def test_runs_of_steps_may_vary_alike(is_alike, expected):
    draw, steps = Random(3), []
    for _ in range(60):
        factor = draw.uniform(0.7, 1.3)
        for context in range(50, 70):
            shape = step_shape([(context, 1, 1)] * 2)
            noise = factor if is_alike else draw.uniform(0.7, 1.3)
            steps.append((shape, FittedCost.of(TRUE).seconds(shape) * noise))
    assert spread(TRUE, steps)[0].correlation == pytest.approx(expected, abs=0.1)


def test_a_step_follows_another_if_it_decodes_the_same_sequences():
    before = step_shape([(50, 1, 1), (20, 1, 1)])
    assert is_next(before, step_shape([(51, 1, 1), (21, 1, 1)]))
    assert not is_next(before, step_shape([(51, 1, 1)]))
    assert not is_next(before, step_shape([(51, 1, 1), (80, 1, 1)]))
    assert not is_next(before, step_shape([(51, 1, 1), (21, 1, 1), (0, 9, 9)]))
