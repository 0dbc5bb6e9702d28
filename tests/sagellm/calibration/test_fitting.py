"""The fit of a step's cost to measured steps."""

import numpy as np
import pytest

from sagellm.calibration.fitting import fit, nonnegative, spread
from sagellm.runtime.engine.costs.fitted import FittedCost, FittedForm
from sagellm.runtime.engine.step_cost import StepShape, step_shape

TRUE = FittedForm(1e-3, (0.0, 64.0, 512.0), (0.0, 2e-3, 9e-3), 1e-7, 1e-6, 5e-5, 2e-4)


def shapes(batches, contexts, prefills):
    for batch in batches:
        for context in contexts:
            yield step_shape([(context, 1, 1)] * batch)
    for count in prefills:
        for start in (0, 200, 900):
            yield step_shape([(start, count, start + count)])
            yield step_shape([(start, count, start + count), *[(300, 1, 1)] * 8])


def test_a_fit_predicts_steps_that_it_has_not_seen():
    cost = FittedCost.of(TRUE)
    seen = shapes((1, 2, 4, 8, 16, 32, 64), (16, 300, 1500), (2, 8, 16, 64, 128, 256, 512))
    found = fit([(shape, cost.seconds(shape)) for shape in seen])
    unseen = [(one, cost.seconds(one)) for one in shapes((3, 20, 48), (100, 700), (30, 90, 400))]
    ratios = spread(found, unseen)
    assert ratios["p5"] == pytest.approx(1, rel=0.02)
    assert ratios["p95"] == pytest.approx(1, rel=0.02)


def test_no_coefficient_is_negative():
    falling = [(StepShape(0, 0, batch, 100), 1.0 / batch) for batch in (1, 2, 4)]
    found = fit(falling)
    assert min(found.step_s, found.row_s, found.decode_context_s, *found.token_seconds) >= 0


def test_least_squares_above_zero():
    """Without the bound, the second would be -1: the first then takes the mean."""
    found = nonnegative(np.array([[1.0, 0.0], [1.0, 1.0]]), np.array([2.0, 1.0]))
    assert found == pytest.approx([1.5, 0.0])


def test_nothing_is_fitted_to_nothing():
    with pytest.raises(ValueError, match="no step"):
        fit([])
