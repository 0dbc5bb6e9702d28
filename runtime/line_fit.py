"""A line through samples, by least squares: what requests take, by their tokens."""

import msgspec

_SPREAD = 0.1  # of the mean: tokens that differ less show no slope


class LineFit(msgspec.Struct, frozen=True):
    """Seconds by tokens, learned from samples of which the older count less; a value.

    The line never falls, and begins at no less than zero seconds. Where samples of about one size
    show no slope, it is the one through the origin. `weight`: of all samples; each began as 1.
    """

    weight: float = 0.0
    tokens: float = 0.0  # sums, faded
    seconds: float = 0.0
    squares: float = 0.0
    products: float = 0.0

    def with_samples(
        self, num_tokens: float, seconds: float, *, count: int = 1, kept: float = 1.0
    ) -> "LineFit":
        """With `count` equal samples that add up to these. `kept`: the share of their weight that
        the samples before keep.
        """
        return LineFit(
            self.weight * kept + count,
            self.tokens * kept + num_tokens,
            self.seconds * kept + seconds,
            self.squares * kept + num_tokens * num_tokens / count,
            self.products * kept + num_tokens * seconds / count,
        )

    def seconds_of(self, num_tokens: float, count: float = 1.0) -> float:
        """What `count` requests take that have so many tokens together. There are samples."""
        mean, mean_s = self.tokens / self.weight, self.seconds / self.weight
        slope = self._slope(mean, mean_s)
        return count * (mean_s - slope * mean) + slope * num_tokens

    def _slope(self, mean: float, mean_s: float) -> float:
        if mean <= 0:
            return 0.0
        variance = self.squares / self.weight - mean * mean
        if variance <= (_SPREAD * mean) ** 2:
            return mean_s / mean
        slope = (self.products / self.weight - mean * mean_s) / variance
        return min(max(slope, 0.0), mean_s / mean)
