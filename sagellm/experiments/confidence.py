"""The difference of two arms, with confidence intervals that also hold if they are looked at often.

The arms are compared by their means over requests. Requests are not independent: those of one unit,
such as a user, are alike, and those of one time share queues and bursts. So the variance is that of
clusters (Liang and Zeger 1986; G / (G - 1) for G clusters), by units or by blocks of time,
whichever is larger. A block has the requests of both arms: what slows both does not count.

Two intervals. The one of a fixed sample, normal, holds at one moment that was chosen beforehand.
The other holds at all moments at once, so a test may be looked at after every request and stopped
as soon as the interval excludes 0, with at most `alpha` false alarms. It is the confidence sequence
of Robbins' normal mixture: with the variance V of the difference, and the information v,

    |difference - truth| <= sqrt(V * (1 + 1 / (v r)) * log((1 + v r) / alpha^2))

Sources: Robbins, Statistical methods related to the law of the iterated logarithm, 1970; the same
bound as a test, mSPRT: Johari, Koomen, Pekelis and Walsh, Always valid inference, Operations
Research 2022; Howard, Ramdas, McAuliffe and Sekhon, Time-uniform, nonparametric, nonasymptotic
confidence sequences, Annals of Statistics 2021; with an estimated variance it is asymptotic:
Waudby-Smith, Arbour, Sinha, Kennedy and Ramdas, Time-uniform central limit theory, Annals of
Statistics 2024, whose r (their rho^2) makes the interval shortest at a chosen sample size. The
information of clustered requests is their number over the design effect (Kish 1965).
"""

import math
from dataclasses import dataclass, field
from statistics import NormalDist, correlation

MIN_UNITS = 30  # in each arm, and blocks of time, before an estimated variance is trusted
BETTER_A, BETTER_B, EQUAL, OPEN = "a is better", "b is better", "no difference", "open"


@dataclass(slots=True)
class ArmSums:
    """The sums of one metric in one arm, by unit. `add` takes constant time."""

    num: int = 0
    _shift: float = 0.0  # the first value: sums of differences from it lose no digits
    _total: float = 0.0
    _squares: float = 0.0
    _units: dict[str, tuple[float, int]] = field(default_factory=dict)  # sum, number
    # Sums over the units: of squared sums, of sum * number, of squared numbers.
    _sum_squares: float = 0.0
    _products: float = 0.0
    _num_squares: int = 0

    def add(self, unit: str, value: float) -> None:
        if not self.num:
            self._shift = value
        value -= self._shift
        total, num = self._units.get(unit, (0.0, 0))
        self._units[unit] = total + value, num + 1
        self._sum_squares += (total + value) ** 2 - total**2
        self._products += (total + value) * (num + 1) - total * num
        self._num_squares += 2 * num + 1
        self._total += value
        self._squares += value * value
        self.num += 1

    @property
    def num_units(self) -> int:
        return len(self._units)

    @property
    def mean(self) -> float:
        return self._shift + self._total / self.num

    @property
    def variance_of_mean(self) -> float:
        """The variance of `mean`, where only units are independent. Needs two units."""
        mean, units = self._total / self.num, len(self._units)
        spread = self._sum_squares - 2 * mean * self._products + mean * mean * self._num_squares
        return max(spread, 0.0) / self.num**2 * units / (units - 1)

    @property
    def plain_variance_of_mean(self) -> float:
        """The variance of `mean` if all requests were independent. Needs two requests."""
        spread = self._squares - self._total**2 / self.num
        return max(spread, 0.0) / (self.num * (self.num - 1))


@dataclass(slots=True)
class BlockSums:
    """The sums of one metric over blocks of time, which come in order. `add` takes constant time.

    A block is x = (sum, number) of arm a and of arm b. `_products` is the sum of x x' over the
    blocks before the current one.
    """

    num_blocks: int = 0
    _shift: float = 0.0
    _number: int | None = None  # of the current block
    _block: list[float] = field(default_factory=lambda: [0.0] * 4)
    _products: list[float] = field(default_factory=lambda: [0.0] * 16)
    # Of the difference of means, from block to block: for their correlation.
    _steps: list[float] = field(default_factory=list)

    def add(self, number: int, value: float, *, is_b: bool) -> None:
        """Add a value of the block `number`."""
        if self._number is None:
            self._shift = value
        if number != self._number:
            self._close()
            self._number = number
            self.num_blocks += 1
        place = 2 if is_b else 0
        self._block[place] += value - self._shift
        self._block[place + 1] += 1

    def _close(self) -> None:
        total_a, num_a, total_b, num_b = block = self._block
        for place, product in enumerate(one * other for one in block for other in block):
            self._products[place] += product
        if num_a and num_b:
            self._steps.append(total_b / num_b - total_a / num_a)
        self._block = [0.0] * 4

    def variance(self, a: ArmSums, b: ArmSums) -> float:
        """The variance of the difference of means, where only blocks are independent."""
        weights = (
            -1 / a.num,
            (a.mean - self._shift) / a.num,
            1 / b.num,
            (self._shift - b.mean) / b.num,
        )
        pairs = [one * other for one in weights for other in weights]
        open_one = sum(one * other for one, other in zip(weights, self._block, strict=True)) ** 2
        spread = sum(one * other for one, other in zip(pairs, self._products, strict=True))
        return max(spread + open_one, 0.0) * self.num_blocks / (self.num_blocks - 1)

    @property
    def correlation(self) -> float | None:
        """The correlation of the difference between a block and the next; None: few blocks."""
        steps = self._steps
        if len(steps) < MIN_UNITS or not any(one != steps[0] for one in steps):
            return None
        return correlation(steps[:-1], steps[1:])


@dataclass(slots=True)
class Sums:
    """One metric of both arms, as requests come in the order of time."""

    a: ArmSums = field(default_factory=ArmSums)
    b: ArmSums = field(default_factory=ArmSums)
    blocks: BlockSums = field(default_factory=BlockSums)

    def add(self, unit: str, block: int, value: float, *, is_b: bool) -> None:
        (self.b if is_b else self.a).add(unit, value)
        self.blocks.add(block, value, is_b=is_b)

    @property
    def num(self) -> int:
        return self.a.num + self.b.num

    @property
    def is_enough(self) -> bool:
        """Whether the variance can be estimated."""
        return min(self.a.num_units, self.b.num_units, self.blocks.num_blocks) >= MIN_UNITS


@dataclass(frozen=True, slots=True)
class Comparison:
    """Two arms at one moment. `fixed`, `always`: half the widths of the two intervals of the
    difference; None: too few units. `deviation`: the standard deviation of the difference.
    `information`: the number of independent requests that would tell as much.
    """

    mean_a: float
    mean_b: float
    fixed: float | None = None
    always: float | None = None
    deviation: float = 0.0
    information: float = 0.0

    @property
    def difference(self) -> float:
        """b - a."""
        return self.mean_b - self.mean_a


@dataclass(frozen=True, slots=True)
class ABTest:
    """The rule of a test. `alpha`: the probability of a false alarm over its whole length.

    `planned`: the number of independent requests at which its intervals are to be shortest. It
    must not be chosen by the data.
    """

    alpha: float = 0.05
    planned: int = 1000

    @property
    def _r(self) -> float:
        weight = -2 * math.log(self.alpha)
        return (weight + math.log(weight) + 1) / self.planned

    def compare(self, sums: Sums) -> Comparison:
        """The arms as they are now. Each needs one request."""
        a, b = sums.a, sums.b
        unknown = Comparison(a.mean, b.mean)
        if not sums.is_enough:
            return unknown
        by_units = _variance(a.variance_of_mean, b.variance_of_mean, a.num, b.num)
        variance = max(by_units, sums.blocks.variance(a, b))
        plain = _variance(a.plain_variance_of_mean, b.plain_variance_of_mean, a.num, b.num)
        if not variance or not plain:  # all values are equal: the variance is unknown
            return unknown
        deviation, information = math.sqrt(variance), sums.num * min(plain / variance, 1.0)
        fixed = NormalDist().inv_cdf(1 - self.alpha / 2) * deviation
        always = self._bound(information) * deviation
        return Comparison(a.mean, b.mean, fixed, always, deviation, information)

    def _bound(self, information: float) -> float:
        """The half-width of the confidence sequence, in standard deviations."""
        grown = information * self._r
        return math.sqrt((1 + 1 / grown) * (math.log(1 + grown) - 2 * math.log(self.alpha)))

    def verdict(self, found: Comparison, *, lower_is_better: bool, margin: float = 0.0) -> str:
        """The state of the test: one arm is better; the difference is within `margin`, either way;
        or neither yet.
        """
        if found.always is None:
            return OPEN
        if abs(found.difference) > found.always:
            return BETTER_B if (found.difference < 0) == lower_is_better else BETTER_A
        return EQUAL if abs(found.difference) + found.always <= margin else OPEN

    def growth_needed(self, found: Comparison) -> float | None:
        """The factor on the requests that would end the test, if the difference and the spread stay
        as they are; None: more than a thousand times as many, or nothing is known.
        """
        for step in range(145) if found.always is not None else ():
            growth = 1.05**step
            width = self._bound(found.information * growth) * found.deviation / math.sqrt(growth)
            if width < abs(found.difference):
                return growth
        return None


def _variance(of_a: float, of_b: float, num_a: int, num_b: int) -> float:
    """The variance of the difference of two means. Neither arm counts with less than the pooled
    variance: a small arm of a skewed metric, such as no miss so far, would seem too certain.
    """
    pooled = (of_a * num_a**2 + of_b * num_b**2) / (num_a + num_b)
    return max(of_a, pooled / num_a) + max(of_b, pooled / num_b)
