"""The spread of measured steps about a cost model, and draws of step times within it."""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import msgspec

from sagellm.runtime.engine.costs.piecewise import PiecewiseLinear
from sagellm.runtime.engine.step_cost import Variation
from sagellm.runtime.operator import Draw

SHARES = (0.01, 0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99)


class StepSpread(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The spread of steps that the cost model expects to take `from_s` seconds or longer.

    `ratios`: the quantiles SHARES of measured over expected seconds. `correlation`: of two steps in
    a row that decode the same sequences.
    """

    from_s: float
    ratios: tuple[float, ...]
    correlation: float = 0.0


def check_spread(spread: Sequence[StepSpread]) -> None:
    """Raise ValueError for quantiles that no measurement gives."""
    for one in spread:
        if len(one.ratios) != len(SHARES):
            raise ValueError(f"spread: {len(one.ratios)} ratios, but {len(SHARES)} quantiles")
        if one.ratios[0] <= 0 or any(low > high for low, high in pairwise(one.ratios)):
            raise ValueError("spread: quantiles are positive and do not fall")
        if not 0 <= one.correlation <= 1:
            raise ValueError(f"spread: a correlation of {one.correlation} is not between 0 and 1")
    if any(low.from_s >= high.from_s for low, high in pairwise(spread)):
        raise ValueError("spread: from_s does not rise")


@dataclass(frozen=True, slots=True)
class _Ratios:
    """A distribution of measured over expected seconds. No ratio is beyond its outer quantiles."""

    at: PiecewiseLinear
    mean: float

    @classmethod
    def of(cls, ratios: tuple[float, ...]) -> "_Ratios":
        inner = zip(pairwise(SHARES), pairwise(ratios), strict=True)
        mean = sum((end - start) * (low + high) / 2 for (start, end), (low, high) in inner)
        mean += SHARES[0] * ratios[0] + (1 - SHARES[-1]) * ratios[-1]
        return cls(PiecewiseLinear(SHARES, ratios), mean)

    def draw(self, draw: Draw) -> float:
        return self.at(min(draw.random(), SHARES[-1]))


class StepVariation:
    """Draws the step times of one replica. Equal seeds, places and numbers give equal draws.

    `place`: the replica, so that no two vary alike.
    """

    def __init__(self, spread: Sequence[StepSpread], seed: int, place: str) -> None:
        self._from_s = [one.from_s for one in spread]
        self._ratios = [_Ratios.of(one.ratios) for one in spread]
        self._correlations = [one.correlation for one in spread]
        self._seed = seed
        self._place = place

    def draw(self, number: int, expected_s: float) -> Variation:
        """The variation of run `number`, whose first step is expected to take `expected_s`."""
        index = max(0, bisect_right(self._from_s, expected_s) - 1)
        ratios = self._ratios[index]
        drawn = ratios.draw(Draw(self._seed, self._place, number))
        return Variation(ratios.mean, drawn - ratios.mean, self._correlations[index])
