"""Fits cost models to measured steps: the cost of a step, its spread, and the time of the host."""

from collections.abc import Collection, Sequence
from typing import TypeAlias

import numpy as np

from sagellm.runtime.engine.costs.fitted import FittedCost, FittedForm
from sagellm.runtime.engine.costs.spread import SHARES, StepSpread
from sagellm.runtime.engine.step_cost import StepShape

TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048)  # knots of functions
CONTEXTS = (2048, 8192, 32768)
_NUM_FACTORS = 5  # before those of the knots
_ENOUGH = 1e-10  # of a scaled coefficient or gradient that counts as zero
_NUM_ROUNDS = 30  # of reweighting; the medians of the residuals are then below 0.1 %
_LEAST = 0.01  # relative residuals below count alike, so that no weight is endless
_WIDTH, _FEWEST = 3.0, 100  # of a class of steps: longest over shortest, and least number

Measured: TypeAlias = tuple[StepShape, float]  # the shape of a step, and its seconds
Matrix: TypeAlias = "np.ndarray[tuple[int, int], np.dtype[np.float64]]"
Vector: TypeAlias = "np.ndarray[tuple[int], np.dtype[np.float64]]"


def fit(steps: Sequence[Measured]) -> FittedForm:
    """Fit the cost to measured steps. It minimises the sum of absolute relative errors, which a few
    late steps do not move; no coefficient is negative. Knots beyond the measured steps are left
    out. Raises ValueError without steps.
    """
    if not steps:
        raise ValueError("no step was measured")
    tokens = _knots(TOKENS, max(shape.num_tokens for shape, _ in steps))
    contexts = _knots(CONTEXTS, max(shape.num_decode_context_tokens for shape, _ in steps))
    rows = np.array([_row(shape, tokens, contexts) for shape, _ in steps], dtype=float)
    found = absolute(rows, np.array([seconds for _, seconds in steps], dtype=float))
    step_s, row_s, pair_s, *kinds = map(float, found[:_NUM_FACTORS])
    slopes = list(map(float, found[_NUM_FACTORS:]))
    return FittedForm(
        step_s,
        *_points(tokens, slopes[: len(tokens)]),
        pair_s,
        *_points(contexts, slopes[len(tokens) :]),
        row_s,
        *kinds,
    )


def spread(form: FittedForm, steps: Sequence[Measured]) -> tuple[StepSpread, ...]:
    """The spread of measured over expected seconds, for short and for long steps apart. `steps`:
    in their order.
    """
    cost = FittedCost.of(form)
    expected_s = [cost.seconds(shape) for shape, _ in steps]
    ratios = [seconds / one for one, (_, seconds) in zip(expected_s, steps, strict=True)]
    order = sorted(range(len(steps)), key=expected_s.__getitem__)
    found: list[StepSpread] = []
    while order:
        shortest_s = expected_s[order[0]]
        num = sum(expected_s[index] <= _WIDTH * shortest_s for index in order)
        num = max(num, _FEWEST)
        if len(order) - num < _FEWEST:
            num = len(order)
        chosen, order = order[:num], order[num:]
        values = np.quantile([ratios[index] for index in chosen], SHARES)
        from_s = shortest_s if found else 0.0
        correlation = _correlation(steps, ratios, set(chosen))
        found.append(StepSpread(from_s, tuple(map(float, values.round(4))), correlation))
    return tuple(found)


def _correlation(
    steps: Sequence[Measured], ratios: Sequence[float], chosen: Collection[int]
) -> float:
    """The correlation of the logarithms of two ratios in a row, of steps that decode the same
    sequences; 0 if there are few.
    """
    pairs = [
        (ratios[index - 1], ratios[index])
        for index in chosen
        if index and is_next(steps[index - 1][0], steps[index][0])
    ]
    if len(pairs) < _FEWEST:
        return 0.0
    before, after = np.log(pairs).T
    found = float(np.corrcoef(before, after)[0, 1])
    return round(min(max(found, 0.0), 1.0), 3) if np.isfinite(found) else 0.0


def is_next(before: StepShape, after: StepShape) -> bool:
    """Whether a step decodes the sequences that the step before decoded, and no prompt."""
    num_rows = before.num_decode_rows
    num_grown = after.num_context_tokens - before.num_context_tokens
    is_same = num_rows == after.num_decode_rows and num_grown == num_rows
    return is_same and not before.num_prefill_rows and not after.num_prefill_rows


def line(points: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Start and slope, both at least 0, of the line with the least absolute relative errors."""
    rows = np.array([(1.0, x) for x, _ in points], dtype=float)
    start, slope = absolute(rows, np.array([y for _, y in points], dtype=float))
    return float(start), float(slope)


def _knots(known: Sequence[int], largest: int) -> list[int]:
    """The knots up to the largest value. The last segment is wide: it is continued beyond it."""
    return [knot for knot in known if knot <= largest * 2 / 3] + [max(largest, 1)]


def _points(
    knots: Sequence[int], slopes: Sequence[float]
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """The function with these slopes before the knots: where it has points, and their values."""
    values, before, value = [0.0], 0, 0.0
    for knot, slope in zip(knots, slopes, strict=True):
        value += slope * (knot - before)
        values.append(value)
        before = knot
    return (0.0, *map(float, knots)), tuple(values)


def _row(shape: StepShape, tokens: Sequence[int], contexts: Sequence[int]) -> list[float]:
    """The factors of the coefficients: of a step, sequence and pair, of a step with a prompt, of
    one that also decodes, and of the tokens and context tokens between each two knots.
    """
    counts = 1.0, float(shape.num_rows), float(shape.num_prefill_pairs)
    kinds = float(shape.num_prefill_tokens > 0), float(shape.is_mixed)
    parts = _parts(shape.num_tokens, tokens) + _parts(shape.num_decode_context_tokens, contexts)
    return [*counts, *kinds, *parts]


def _parts(value: int, knots: Sequence[int]) -> list[float]:
    parts, before = [], 0
    for knot in knots:
        parts.append(float(min(max(value - before, 0), knot - before)))
        before = knot
    return parts


def absolute(rows: Matrix, target: Vector) -> Vector:
    """The least sum of |`rows` @ x - `target`| / (`rows` @ x) over x >= 0, by least squares whose
    weights are the inverse residuals of the round before.
    """
    weights = 1 / target
    found = nonnegative(rows * weights[:, None], target * weights)
    for _ in range(_NUM_ROUNDS):
        expected = np.maximum(rows @ found, np.finfo(float).tiny)
        residuals = np.maximum(np.abs(target - expected) / expected, _LEAST)
        weights = 1 / (expected * np.sqrt(residuals))
        found = nonnegative(rows * weights[:, None], target * weights)
    return found


def nonnegative(rows: Matrix, target: Vector) -> Vector:
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
    unscaled: Vector = found / scale
    return unscaled
