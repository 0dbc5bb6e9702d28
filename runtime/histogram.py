"""A histogram of durations as a value: each sample gives a new one."""

import math
from collections.abc import Sequence
from itertools import groupby

import msgspec
from immutables import Map

GROWTH = 1.02  # each bucket is 2 % wider than the one before: a quantile is right within 1 %
_LEAST = 1e-9  # what is shorter, zero too, falls into the first bucket
_LOG_GROWTH = math.log(GROWTH)


class Histogram(msgspec.Struct, frozen=True):
    """Counts per bucket; some hundred buckets span nanoseconds to days."""

    counts: Map[int, int] = Map()
    num_samples: int = 0

    def with_sample(self, value: float) -> "Histogram":
        bucket = _bucket(value)
        return Histogram(
            self.counts.set(bucket, self.counts.get(bucket, 0) + 1), self.num_samples + 1
        )

    def with_samples(self, values: Sequence[float]) -> "Histogram":
        """Equal values that follow each other, as the gaps of one engine step, cost little."""
        counts = self.counts
        for value, equal in groupby(values):
            bucket = _bucket(value)
            counts = counts.set(bucket, counts.get(bucket, 0) + sum(1 for _ in equal))
        return Histogram(counts, self.num_samples + len(values))

    def quantile(self, share: float) -> float | None:
        """The value that at least `share` (0 ... 1) of the samples do not pass; None of none."""
        rank = max(math.ceil(share * self.num_samples), 1)
        for bucket in sorted(self.counts):
            rank -= self.counts[bucket]
            if rank <= 0:
                return _LEAST * GROWTH ** (bucket + 0.5) if bucket else 0.0
        return None


def _bucket(value: float) -> int:
    return int(math.log(value / _LEAST) / _LOG_GROWTH) if value > _LEAST else 0
