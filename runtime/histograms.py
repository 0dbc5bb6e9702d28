"""Histograms: counts of samples in fixed buckets, and in logarithmic buckets as a value."""

import math
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from itertools import groupby

import msgspec
from immutables import Map


class Buckets:
    """Counts in buckets with fixed upper bounds; a sample costs a tenth of a microsecond.

    A sample falls into the first bucket whose bound it does not exceed; the last bucket is
    unbounded. `total`: the sum of all samples.
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
        """A copy of all counts."""
        copied = Buckets(self.bounds)
        copied.counts, copied.total = self.counts.copy(), self.total
        return copied

    def add(self, other: "Buckets") -> None:
        """Add the counts of another histogram with the same bounds."""
        self.counts = [a + b for a, b in zip(self.counts, other.counts, strict=True)]
        self.total += other.total

    @property
    def num_samples(self) -> int:
        return sum(self.counts)

    def cumulative(self) -> Iterator[tuple[float, int]]:
        """(bound, samples up to the bound), with infinity last: the form of Prometheus."""
        passed = 0
        for bound, count in zip((*self.bounds, float("inf")), self.counts, strict=True):
            passed += count
            yield bound, passed


GROWTH = 1.02  # each bucket is 2 % wider than the last: a quantile is exact within 1 %
_LEAST = 1e-9  # shorter durations, zero included, fall into the first bucket
_LOG_GROWTH = math.log(GROWTH)


class LogHistogram(msgspec.Struct, frozen=True):
    """Counts in logarithmic buckets, as a value; some hundred buckets span nanoseconds to days."""

    counts: Map[int, int] = Map()
    num_samples: int = 0

    def with_sample(self, value: float) -> "LogHistogram":
        bucket = _bucket(value)
        return LogHistogram(
            self.counts.set(bucket, self.counts.get(bucket, 0) + 1), self.num_samples + 1
        )

    def with_samples(self, values: Sequence[float]) -> "LogHistogram":
        """Add several samples; equal ones in a row, as the gaps of one engine step, cost little."""
        counts = self.counts
        for value, equal in groupby(values):
            bucket = _bucket(value)
            counts = counts.set(bucket, counts.get(bucket, 0) + sum(1 for _ in equal))
        return LogHistogram(counts, self.num_samples + len(values))

    def quantile(self, share: float) -> float | None:
        """The value that at least `share` (0 ... 1) of the samples do not exceed.

        None without samples.
        """
        rank = max(math.ceil(share * self.num_samples), 1)
        for bucket in sorted(self.counts):
            rank -= self.counts[bucket]
            if rank <= 0:
                return _LEAST * GROWTH ** (bucket + 0.5) if bucket else 0.0
        return None


def _bucket(value: float) -> int:
    return int(math.log(value / _LEAST) / _LOG_GROWTH) if value > _LEAST else 0
