"""Forecasts of demand: how many requests will come each second, and how long they will be."""

import math
from typing import Literal, TypeAlias

import msgspec
from msgspec.structs import replace

ForecastMethod: TypeAlias = Literal["constant", "ewma", "holt"]

_LEVEL_WEIGHT = 0.4  # weight of the latest interval in the level
_TREND_WEIGHT = 0.2  # weight of the latest change of the level in the trend
_DEVIATIONS = 3.0  # standard deviations by which a rate exceeds the expected one at a new level
_NOISE_WEIGHT = 0.1  # weight of the latest interval in the noise
_DAMPING = 0.9  # how much of the trend is left after each interval
_MAX_GAP = 64  # intervals without a request that are counted; after them the level is near zero
_NUM_RECENT = 50  # requests in the moving means of recent lengths
_NUM_USUAL = 1000  # requests in the moving means of usual lengths


class RateForecast(msgspec.Struct, frozen=True):
    """A forecast of a rate, from its values in intervals of equal length. Immutable.

    `method` "constant": the rate stays as in the latest interval. "ewma": it stays at the
    exponentially weighted mean. "holt": Holt's linear method with a damped trend (Gardner and
    McKenzie 1985). `trend`: the change of the level in an interval. `noise`: the moving mean of the
    squared difference between a rate and the expected one.
    """

    method: ForecastMethod = "holt"
    level: float | None = None
    trend: float = 0.0
    noise: float = 0.0

    def after(self, rate: float, seconds: float) -> "RateForecast":
        """The forecast with the rate of one more interval, which lasted `seconds`.

        A rate that is too high to be chance is a new level, and not the begin of a trend: it is
        three standard deviations above the expected rate, of a Poisson process or as measured.
        """
        before = self.level
        if before is None or self.method == "constant":
            return replace(self, level=rate)
        drift = _DAMPING * self.trend
        expected, excess = max(before + drift, 1 / seconds), rate - before - drift
        noise = self.noise + _NOISE_WEIGHT * (excess * excess - self.noise)
        if excess > _DEVIATIONS * math.sqrt(max(self.noise, expected / seconds)):
            return replace(self, level=rate, trend=0.0, noise=noise)
        level = before + drift + _LEVEL_WEIGHT * excess
        if self.method == "ewma":
            return replace(self, level=level, noise=noise)
        trend = drift + _TREND_WEIGHT * (level - before - drift)
        return replace(self, level=level, trend=trend, noise=noise)

    def after_gap(self, num_intervals: int, seconds: float) -> "RateForecast":
        """The forecast after intervals in which nothing came."""
        if self.level is None:
            return self
        forecast = self
        for _ in range(min(num_intervals, _MAX_GAP)):
            forecast = forecast.after(0.0, seconds)
        return forecast

    def at(self, num_intervals: float) -> float:
        """The predicted rate after so many intervals; 0 if nothing was measured."""
        damped = float(_DAMPING * (1 - _DAMPING**num_intervals) / (1 - _DAMPING))
        return max((self.level or 0.0) + damped * self.trend, 0.0)


class MeanLength(msgspec.Struct, frozen=True):
    """Moving means of a length in tokens: over recent requests, and over many more."""

    num_requests: int = 0
    recent: float = 0.0
    usual: float = 0.0

    def after(self, num_tokens: int) -> "MeanLength":
        num_requests = self.num_requests + 1
        return MeanLength(
            num_requests,
            self.recent + (num_tokens - self.recent) / min(num_requests, _NUM_RECENT),
            self.usual + (num_tokens - self.usual) / min(num_requests, _NUM_USUAL),
        )


class Demand(msgspec.Struct, frozen=True):
    """The requests that came, and a forecast of those that will come. Immutable.

    `begun_s`: the begin of the current interval. `num_arrived`: the requests in it.
    """

    rate: RateForecast
    begun_s: float = 0.0
    num_arrived: int = 0
    prompts: MeanLength = MeanLength()
    outputs: MeanLength = MeanLength()

    def with_request(self, num_prompt_tokens: int, max_tokens: int) -> "Demand":
        """The demand with one more request."""
        return replace(
            self,
            num_arrived=self.num_arrived + 1,
            prompts=self.prompts.after(num_prompt_tokens),
            outputs=self.outputs.after(max_tokens),
        )

    def closed(self, now: float) -> "Demand":
        """The demand with a new interval, which begins now. The one before must have lasted."""
        seconds = now - self.begun_s
        rate = self.rate.after(self.num_arrived / seconds, seconds)
        return replace(self, rate=rate, begun_s=now, num_arrived=0)

    def resumed(self, now: float, interval_s: float) -> "Demand":
        """The demand with an interval that begins now, after a time without requests."""
        num_empty = int((now - self.begun_s) / interval_s)
        return replace(self, rate=self.rate.after_gap(num_empty, interval_s), begun_s=now)

    def peak(self, num_intervals: float) -> float:
        """The higher of the rates now and after so many intervals, in requests a second."""
        return max(self.rate.at(0), self.rate.at(num_intervals))

    def stretch(self, *, counts_outputs: bool) -> float:
        """How much longer recent requests are than usual ones: a factor from 1/2 to 2."""
        recent, usual = self.prompts.recent, self.prompts.usual
        if counts_outputs:
            recent, usual = recent + self.outputs.recent, usual + self.outputs.usual
        return min(max(recent / usual, 0.5), 2.0) if usual > 0 else 1.0
