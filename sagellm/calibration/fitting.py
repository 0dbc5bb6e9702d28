"""Fits the cost of a step to measured steps."""

from collections.abc import Sequence

import numpy as np

from sagellm.runtime.engine.costs.fitted import FittedCost, FittedForm
from sagellm.runtime.engine.step_cost import StepShape

QUANTILES = (5, 25, 50, 75, 95)
KNOTS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048)
_ENOUGH = 1e-10  # of a scaled coefficient or gradient that counts as zero

Measured = tuple[StepShape, float]  # the shape of a step, and its seconds


def fit(steps: Sequence[Measured]) -> FittedForm:
    """Fit the cost to measured steps. It minimises the squares of relative errors; no coefficient
    is negative. Knots beyond the measured tokens are left out. Raises ValueError without steps.
    """
    if not steps:
        raise ValueError("no step was measured")
    largest = max(shape.num_tokens for shape, _ in steps)
    knots = [knot for knot in KNOTS if knot < largest] + [largest]
    rows = np.array([_row(shape, knots) for shape, _ in steps], dtype=float)
    seconds = np.array([measured for _, measured in steps], dtype=float)
    step_s, row_s, prefill_row_s, pair_s, context_s, *slopes = nonnegative(
        rows / seconds[:, None], np.ones(len(steps))
    )
    values, before, value = [], 0, 0.0
    for knot, slope in zip(knots, slopes, strict=True):
        value += slope * (knot - before)
        values.append(value)
        before = knot
    return FittedForm(
        float(step_s),
        (0.0, *map(float, knots)),
        (0.0, *map(float, values)),
        float(pair_s),
        float(context_s),
        float(row_s),
        float(prefill_row_s),
    )


def _row(shape: StepShape, knots: Sequence[int]) -> list[float]:
    """The factors of the coefficients: of a step, sequence, prompt, pair, context token, and of the
    tokens between each two knots.
    """
    parts, before = [], 0
    for knot in knots:
        parts.append(float(min(max(shape.num_tokens - before, 0), knot - before)))
        before = knot
    rows = float(shape.num_rows), float(shape.num_prefill_rows)
    pairs, contexts = float(shape.num_prefill_pairs), float(shape.num_decode_context_tokens)
    return [1.0, *rows, pairs, contexts, *parts]


def nonnegative(
    rows: "np.ndarray[tuple[int, int], np.dtype[np.float64]]",
    target: "np.ndarray[tuple[int], np.dtype[np.float64]]",
) -> "np.ndarray[tuple[int], np.dtype[np.float64]]":
    """The least squares of `rows` @ x - `target` over x >= 0, by the active sets of Lawson and
    Hanson.
    """
    scale = np.sqrt((rows**2).sum(axis=0))
    scale[scale == 0] = 1.0
    scaled = rows / scale
    num = rows.shape[1]
    found, is_free = np.zeros(num), np.zeros(num, dtype=bool)
    for _ in range(3 * num):
        gradient = scaled.T @ (target - scaled @ found)
        gradient[is_free] = -np.inf
        best = int(np.argmax(gradient))
        if gradient[best] <= _ENOUGH:
            break
        is_free[best] = True
        while True:
            trial = np.zeros(num)
            trial[is_free] = np.linalg.lstsq(scaled[:, is_free], target, rcond=None)[0]
            negative = is_free & (trial <= 0)
            if not negative.any():
                break
            fall = np.maximum(found[negative] - trial[negative], np.finfo(float).tiny)
            shares = found[negative] / fall
            found = found + shares.min() * (trial - found)
            is_free &= found > _ENOUGH
            found[~is_free] = 0.0
        found = trial
    unscaled: np.ndarray[tuple[int], np.dtype[np.float64]] = found / scale
    return unscaled


def spread(form: FittedForm, steps: Sequence[Measured]) -> dict[str, float]:
    """Quantiles of measured over predicted seconds."""
    cost = FittedCost.of(form)
    ratios = [measured / cost.seconds(shape) for shape, measured in steps]
    return {f"p{part}": float(np.quantile(ratios, part / 100)) for part in QUANTILES}
