"""Forecasts of queueing times and latencies, learned from feedback.

A `Forecast` is immutable. An operator that subscribes to "queue", "first_token" or "load" passes
each report to `Forecast.after` and keeps the returned forecast in its state. A prediction is None
until enough reports have come.
"""

import math
from collections.abc import Collection, Mapping

import msgspec
from immutables import Map
from msgspec.structs import astuple, replace

from sagellm.runtime.feedback import Backlog, FirstToken, LoadReported, QueueChanged
from sagellm.runtime.messages import Request
from sagellm.runtime.port import EngineLoad

_SPREAD = 0.1  # least standard deviation of tokens, relative to their mean, to fit a slope
_MEMORY_S = 2.0  # busy time after which the weight of a served request has fallen to 1/e
_MIN_SERVED = 8  # served requests before the first prediction, and before old ones may fade
_FIRST_TOKEN_WEIGHT = 1 / 8  # weight of the latest first token in the moving mean
_DEVIATIONS = 3.0  # standard deviations above the mean wait
_NUM_GAPS = 32  # gaps between departures that are kept
_BURST_S = 1e-3  # departures with a shorter gap count as simultaneous
_QUANTILE = 0.95  # quantile of the kept gaps that predicts the end of a gap
_MIN_PREFILLS = 8.0  # observed prefills before the first prediction
_FADE = 1 - 1 / 64  # factor on the weight of earlier prefills, with each new prefill
_STEP_WEIGHT = 1 / 8  # weight of the latest step in the moving mean
# Factors on predicted waits after late and timely first tokens; 2 % of late ones cancel them out.
_LATE_FACTOR = 1.25
_IN_TIME_FACTOR = 0.995
_MAX_CORRECTION = 4.0


class LineFit(msgspec.Struct, frozen=True):
    """An immutable least-squares fit of seconds by tokens, in which older samples lose weight.

    The slope and the intercept are at least zero. If all samples have about the same number of
    tokens, the line goes through the origin. `weight`: the sum of all weights; a new sample has
    weight 1.
    """

    weight: float = 0.0
    tokens: float = 0.0  # weighted sums, as are the next fields
    seconds: float = 0.0
    squares: float = 0.0
    products: float = 0.0

    def with_samples(
        self, num_tokens: float, seconds: float, *, count: float = 1, kept: float = 1.0
    ) -> "LineFit":
        """The fit with `count` equal samples added, `num_tokens` and `seconds` in total.

        `kept`: a factor on the weight of earlier samples.
        """
        return LineFit(
            self.weight * kept + count,
            self.tokens * kept + num_tokens,
            self.seconds * kept + seconds,
            self.squares * kept + num_tokens * num_tokens / count,
            self.products * kept + num_tokens * seconds / count,
        )

    def seconds_of(
        self, num_tokens: float, count: float = 1.0, *, through_origin: bool = True
    ) -> float:
        """The time of `count` requests with `num_tokens` in total. Needs at least one sample.

        `through_origin`: False if the time is constant where all samples have about the same number
        of tokens, as the time of a step is.
        """
        mean, mean_s = self.tokens / self.weight, self.seconds / self.weight
        slope = self._slope(mean, mean_s, through_origin)
        return count * (mean_s - slope * mean) + slope * num_tokens

    def tokens_within(self, seconds: float) -> float:
        """The most tokens of a request that takes at most `seconds`. Needs at least one sample.

        Infinite if the time does not grow with the tokens. If all samples have about the same
        number of tokens, the line goes through the origin, so that the answer is cautious.
        """
        mean, mean_s = self.tokens / self.weight, self.seconds / self.weight
        slope = self._slope(mean, mean_s, through_origin=True)
        if slope > 0:
            return max(mean + (seconds - mean_s) / slope, 0.0)
        return math.inf if mean_s <= seconds else 0.0

    def _slope(self, mean: float, mean_s: float, through_origin: bool) -> float:
        if mean <= 0:
            return 0.0
        variance = self.squares / self.weight - mean * mean
        if variance <= (_SPREAD * mean) ** 2:
            return mean_s / mean if through_origin else 0.0
        slope = (self.products / self.weight - mean * mean_s) / variance
        return min(max(slope, 0.0), mean_s / mean)


class QueuePace(msgspec.Struct, frozen=True):
    """The speed at which a queue is served, learned from backlogs and first tokens. Immutable.

    A departure is a request that leaves the queue for an engine. `intervals`: the time between
    departures by prompt tokens. If engines mostly prefill, the time grows with the tokens; if long
    answers occupy all engines, it does not. Intervals lose weight with busy time, so that the fit
    follows the load, but never faster than requests are served: the fit must outlast minutes
    without a departure. `silent_s`: busy time from the last departure to `seen_s`. `gaps`: busy
    time before each of the latest departures.
    """

    backlog: Backlog = Backlog()
    intervals: LineFit = LineFit()
    silent_s: float = 0.0
    seen_s: float = 0.0
    gaps: tuple[float, ...] = ()
    first_token_s: float = 0.0  # moving mean of the time from the queue to the first token

    def with_backlog(self, backlog: Backlog, now: float) -> "QueuePace":
        """The pace with one more report of the backlog."""
        silent_s = self.silent_s + backlog.busy_s - self.backlog.busy_s
        num_served = backlog.num_served - self.backlog.num_served
        if not num_served:
            return replace(self, backlog=backlog, silent_s=silent_s, seen_s=now)
        tokens = backlog.num_served_tokens - self.backlog.num_served_tokens
        gap_s = silent_s / num_served
        faded = math.exp(-min(silent_s / _MEMORY_S, num_served / _MIN_SERVED))
        return replace(
            self,
            backlog=backlog,
            intervals=self.intervals.with_samples(tokens, silent_s, count=num_served, kept=faded),
            silent_s=0.0,
            seen_s=now,
            gaps=(*self.gaps, gap_s)[-_NUM_GAPS:] if gap_s > _BURST_S else self.gaps,
        )

    def with_first_token(self, seconds: float) -> "QueuePace":
        """The pace with one more first token, `seconds` after its request left the queue."""
        if not self.first_token_s:
            return replace(self, first_token_s=seconds)
        change = _FIRST_TOKEN_WEIGHT * (seconds - self.first_token_s)
        return replace(self, first_token_s=self.first_token_s + change)

    def long_wait_s(self, now: float) -> float | None:
        """A high quantile of the queueing time of a new request with an objective, in seconds.

        Only a few in a hundred wait longer. Waiting requests without an objective (`num_patient`)
        do not count, because they are served later. None until enough requests were served.

        The larger of two estimates. By rate: departures are taken as a Poisson process, in which
        the time of n departures has the relative standard deviation 1 / sqrt(n). By gaps: among
        the kept gaps that were at least as long as the current gap, the 95th percentile. The second
        covers answers of equal length that begin together: they also end together, and a long gap
        follows, which the rate does not show.
        """
        backlog = self.backlog
        num_ahead = backlog.num_requests - backlog.num_patient
        num_tokens = backlog.num_prompt_tokens - backlog.num_patient_tokens
        wait_s = self._seconds_of(num_ahead, num_tokens, now)
        if wait_s is None:
            return None
        by_rate_s = wait_s * (1 + _DEVIATIONS / math.sqrt(max(num_ahead, 1)))
        return max(by_rate_s, self._rest_of_silence_s(now))

    def wait_s(self, now: float) -> float | None:
        """The time until all waiting requests have left the queue; None if unknown."""
        return self._seconds_of(self.backlog.num_requests, self.backlog.num_prompt_tokens, now)

    def _silence_s(self, now: float) -> float:
        """The current gap: busy time since the last departure."""
        if self.backlog.is_open:
            return self.silent_s
        return self.silent_s + max(now - self.seen_s, 0.0)

    def _rest_of_silence_s(self, now: float) -> float:
        silence_s = self._silence_s(now)
        longer = sorted(gap for gap in self.gaps if gap >= silence_s)
        return longer[int(_QUANTILE * len(longer))] - silence_s if longer else 0.0

    def _seconds_of(self, num_requests: int, num_tokens: int, now: float) -> float | None:
        """The time until `num_requests` waiting requests have left; None if unknown.

        The current gap lowers the estimated rate, so that the estimate grows while nothing leaves.
        """
        known = self.intervals
        if self.backlog.num_served < _MIN_SERVED or known.seconds + self._silence_s(now) <= 0:
            return None
        if known.seconds <= 0:
            known = known.with_samples(0, self._silence_s(now))
            return known.seconds_of(num_tokens, num_requests)
        scale = 1 + self._silence_s(now) / known.seconds
        return scale * known.seconds_of(num_tokens, num_requests)


class ReplicaSpeed(msgspec.Struct, frozen=True):
    """The measured speed of one replica of an engine, learned from its feedback. Immutable.

    `first_token_s`: the moving mean of the time from the queue to the first token. `measured_s`:
    when the latest first token came. `prefills`: the time of prefills by computed tokens. `steps`:
    the time of steps by running sequences. `latest`: the number of the latest reported step, and
    the time of its report.
    """

    first_token_s: float | None = None
    measured_s: float = 0.0
    prefills: LineFit = LineFit()
    steps: LineFit = LineFit()
    latest: tuple[int, float] = (0, math.inf)

    @property
    def is_known(self) -> bool:
        """Whether anything was measured."""
        return self.first_token_s is not None or self.steps.weight > 0

    def after(self, happened: FirstToken | LoadReported, now: float) -> "ReplicaSpeed":
        """The speed with one more report of the replica."""
        if isinstance(happened, LoadReported):
            return self._with_load(happened.load, now)
        mean_s, prefills = self.first_token_s, self.prefills
        change = 0.0 if mean_s is None else _FIRST_TOKEN_WEIGHT * (happened.seconds - mean_s)
        if happened.num_computed_tokens > 0:
            num_tokens = happened.num_computed_tokens
            prefills = prefills.with_samples(num_tokens, happened.computed_s, kept=_FADE)
        mean_s = happened.seconds if mean_s is None else mean_s + change
        return ReplicaSpeed(mean_s, now, prefills, self.steps, self.latest)

    def prefill_s(self, num_tokens: float) -> float | None:
        """The time to compute `num_tokens` prompt tokens; None if no prefill was measured."""
        return self.prefills.seconds_of(num_tokens) if self.prefills.weight else None

    def step_s(self, num_running: int) -> float | None:
        """The time of a step with `num_running` sequences; None if no step was measured."""
        if not self.steps.weight:
            return None
        return self.steps.seconds_of(num_running, through_origin=False)

    def _with_load(self, load: EngineLoad, now: float) -> "ReplicaSpeed":
        num_steps, before_s = load.num_steps - self.latest[0], self.latest[1]
        # After an idle phase the time between reports is not step time: infinity excludes it.
        latest = (load.num_steps, now if load.num_running else math.inf)
        steps = self.steps
        if num_steps > 0 and now > before_s:
            num_rows = num_steps * max(load.num_running, 1)
            steps = steps.with_samples(num_rows, now - before_s, count=num_steps, kept=_FADE)
        return replace(self, steps=steps, latest=latest)


UNKNOWN_SPEED = ReplicaSpeed()


class Forecast(msgspec.Struct, frozen=True):
    """Predicted queueing, prefill and step times of the engines downstream of an operator.

    `pace`: the pace of all queues together. `backlogs`: the latest backlog of each operator.
    `prefills`: the time of prefills by tokens. `step_s`: the mean time of a step while a replica
    was busy. `steps`: by replica, the number of the latest step and the time of its report.

    `num_engines`: the replicas that compute prompts. `correction`: a factor on predicted waits. It
    rises when first tokens come later than `objective_s`, as the pace may fall after a request was
    admitted. Only requests with exactly this objective count, so that no client affects others.
    """

    pace: QueuePace = QueuePace()
    backlogs: Mapping[str, Backlog] = {}
    prefills: LineFit = LineFit()
    step_s: float | None = None
    steps: Map[tuple[str, int], tuple[int, float]] = Map()
    correction: float = 1.0
    objective_s: float | None = None
    num_engines: int = 1

    def after(self, happened: QueueChanged | FirstToken | LoadReported, now: float) -> "Forecast":
        """The forecast with one more report of feedback."""
        match happened:
            case QueueChanged(node=node, backlog=backlog):
                return self._with_backlog(node, backlog, now)
            case FirstToken():
                return self._with_first_token(happened)
            case LoadReported():
                return self._with_load(happened, now)

    def prefill_s(self, num_tokens: float) -> float | None:
        """The time that an engine computes for a prefill of `num_tokens`; None if unknown."""
        return self.prefills.seconds_of(num_tokens) if self._knows_prefills else None

    @property
    def _knows_prefills(self) -> bool:
        return self.prefills.weight >= 0.9 * _MIN_PREFILLS and self.prefills.tokens > 0

    @property
    def overhead_s(self) -> float | None:
        """The mean time from leaving the queue to the first token without the prefill: the queue of
        the engine and the KV transfer, in seconds. None until enough prefills were seen.
        """
        if not self._knows_prefills:
            return None
        return max(self.pace.first_token_s - self.prefills.seconds / self.prefills.weight, 0.0)

    def first_token_s(self, request: Request) -> float:
        """The time from leaving the queue to the first token, in seconds.

        Until enough prefills were seen, this is the mean of all requests. Then the prefill part of
        the mean is replaced by the prediction for the tokens of this request.
        """
        own_s, overhead_s = self.prefill_s(request.num_uncached_tokens), self.overhead_s
        if own_s is None or overhead_s is None:
            return self.pace.first_token_s
        return overhead_s + own_s

    def ttft_s(self, request: Request, now: float) -> float | None:
        """A high quantile of the TTFT of a request that enters the queue now, counted from its
        arrival. Until the pace is known, waiting prompts are taken to last as long as their
        prefills. None if unknown.
        """
        wait_s, backlog, share = self.pace.long_wait_s(now), self.pace.backlog, 1 / self.num_engines
        if wait_s is None and self._knows_prefills:
            num_tokens = share * backlog.num_prompt_tokens
            wait_s = self.prefills.seconds_of(num_tokens, share * backlog.num_requests)
        if wait_s is None:
            return None
        waited_s = max(now - request.stamps.arrived_s, 0.0)
        return waited_s + self.correction * wait_s + self.first_token_s(request)

    def _with_backlog(self, node: str, backlog: Backlog, now: float) -> "Forecast":
        backlogs = {**self.backlogs, node: backlog}
        if len(backlogs) > 1:
            backlog = combined(backlogs.values())
        pace = self.pace.with_backlog(backlog, now)
        return replace(self, pace=pace, backlogs=backlogs)

    def _with_first_token(self, first: FirstToken) -> "Forecast":
        pace, prefills = self.pace.with_first_token(first.seconds), self.prefills
        if first.num_computed_tokens > 0:
            num_tokens = first.num_computed_tokens
            prefills = prefills.with_samples(num_tokens, first.computed_s, kept=_FADE)
        correction = self._correction_after(first)
        return replace(self, pace=pace, prefills=prefills, correction=correction)

    def _correction_after(self, first: FirstToken) -> float:
        since_s, objective_s = first.since_arrival_s, self.objective_s
        if since_s is None or objective_s is None or first.slo_ttft_s != objective_s:
            return self.correction
        changed = self.correction * (_LATE_FACTOR if since_s > objective_s else _IN_TIME_FACTOR)
        return min(max(changed, 1.0), _MAX_CORRECTION)  # never below 1: only lengthens waits

    def _with_load(self, reported: LoadReported, now: float) -> "Forecast":
        load, name = reported.load, (reported.node, reported.replica)
        before = self.steps.get(name)
        # After an idle phase the time between reports is not step time: infinity excludes it.
        steps = self.steps.set(name, (load.num_steps, now if load.num_running else math.inf))
        step_s = self.step_s
        if before is not None and load.num_steps > before[0] and now > before[1]:
            latest_s = (now - before[1]) / (load.num_steps - before[0])
            step_s = latest_s if step_s is None else step_s + _STEP_WEIGHT * (latest_s - step_s)
        return replace(self, steps=steps, step_s=step_s)


def combined(backlogs: Collection[Backlog]) -> Backlog:
    """The sum of several backlogs: waiting and served requests, and busy time."""
    if len(backlogs) == 1:
        return next(iter(backlogs))
    return Backlog(*map(sum, zip(*map(astuple, backlogs), strict=True)))
