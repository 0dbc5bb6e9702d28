"""Feedback: what operators and the core report upstream, a struct for each kind."""

import math
from collections.abc import Collection
from typing import TypeAlias

import msgspec
from msgspec.structs import astuple, replace

from sagellm.runtime.port import EngineLoad
from sagellm.runtime.prefixes import PrefixIndex

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


_MEMORY_S = 2.0  # of busy time: what was served longer ago counts less and less
_EVIDENCE = 8  # requests that must have been served before anything is predicted, or forgotten
_WEIGHT = 1 / 8  # of the latest first token in their mean
_DEVIATIONS = 3.0
_NUM_GAPS = 32  # silences that are remembered
_BURST_S = 1e-3  # departures that are closer are one burst, with no silence between them
_LONG = 0.95  # the share of silences that are not longer than what is predicted


class Backlog(msgspec.Struct, frozen=True):
    """The value of feedback "queue". Tokens are those that a request makes its engine compute.

    `num_served`, `num_served_tokens` and `busy_s` count on from the opening of the graph: what was
    sent on, and the seconds that passed, while something waited or the engines were full. Room that
    came while nothing waited counts as one request of mean size. What is sent on as it arrives, to
    an engine that has room, is not among them: it says nothing of how fast room comes.
    """

    num_requests: int = 0
    num_tokens: int = 0  # of prompts, uncached, and max_tokens
    num_prompt_tokens: int = 0
    num_patient: int = 0  # of the requests: those that let every one with an objective go first
    num_patient_tokens: int = 0  # of their prompts
    num_served: int = 0
    num_served_tokens: int = 0  # of prompts
    busy_s: float = 0.0
    num_full: int = 0  # queues that no engine has room for a request of

    @property
    def is_open(self) -> bool:
        """Whether a request that comes now is sent on at once."""
        return not (self.num_requests or self.num_full)


def combined(backlogs: Collection[Backlog]) -> Backlog:
    """What waits in several queues; what they served, and how long they were busy, adds up."""
    if len(backlogs) == 1:
        return next(iter(backlogs))
    return Backlog(*map(sum, zip(*map(astuple, backlogs), strict=True)))


class QueuePace(msgspec.Struct, frozen=True):
    """How fast a queue is served, learned from its backlogs and from first tokens; a value.

    `intervals` are those between departures, by the tokens of what left: where prefill is what
    engines do most, they grow with tokens, and where long answers hold every place, they do not.
    They fade with busy time, so that they follow the load, but never faster than others are served:
    nothing may leave for minutes, and what is known of the pace must outlast that. `silent_s` has
    passed since the last left, at `seen_s`; `gaps` are the silences before the latest requests that
    left.
    """

    backlog: Backlog = Backlog()
    intervals: LineFit = LineFit()
    silent_s: float = 0.0
    seen_s: float = 0.0
    gaps: tuple[float, ...] = ()
    first_token_s: float = 0.0  # mean, from leaving the queue to the first token

    def with_backlog(self, backlog: Backlog, now: float) -> "QueuePace":
        silent_s = self.silent_s + backlog.busy_s - self.backlog.busy_s
        num_served = backlog.num_served - self.backlog.num_served
        if not num_served:
            return replace(self, backlog=backlog, silent_s=silent_s, seen_s=now)
        tokens = backlog.num_served_tokens - self.backlog.num_served_tokens
        gap_s = silent_s / num_served
        faded = math.exp(-min(silent_s / _MEMORY_S, num_served / _EVIDENCE))
        return replace(
            self,
            backlog=backlog,
            intervals=self.intervals.with_samples(tokens, silent_s, count=num_served, kept=faded),
            silent_s=0.0,
            seen_s=now,
            gaps=(*self.gaps, gap_s)[-_NUM_GAPS:] if gap_s > _BURST_S else self.gaps,
        )

    def with_first_token(self, seconds: float) -> "QueuePace":
        if not self.first_token_s:
            return replace(self, first_token_s=seconds)
        change = _WEIGHT * (seconds - self.first_token_s)
        return replace(self, first_token_s=self.first_token_s + change)

    def long_wait_s(self, now: float) -> float | None:
        """The wait of a newcomer behind those that are not patient, which all but a few in a
        hundred stay below; None before there is evidence.

        Two estimates, of which the longer counts. By rate: departures are taken as Poisson, so that
        the time of n of them has a standard deviation of 1 / sqrt(n) of itself. By silence: the
        next departure comes as late as after all but a twentieth of the silences that have lasted
        at least as long as this one. Where answers of equal length began together they end
        together, and a long silence follows, which the rate does not show.
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
        """How long all that waits takes to leave the queue; None before there is evidence."""
        return self._seconds_of(self.backlog.num_requests, self.backlog.num_prompt_tokens, now)

    def _silence_s(self, now: float) -> float:
        """Since the last departure, in busy time."""
        if self.backlog.is_open:
            return self.silent_s
        return self.silent_s + max(now - self.seen_s, 0.0)

    def _rest_of_silence_s(self, now: float) -> float:
        silence_s = self._silence_s(now)
        longer = sorted(gap for gap in self.gaps if gap >= silence_s)
        return longer[int(_LONG * len(longer))] - silence_s if longer else 0.0

    def _seconds_of(self, num_requests: int, num_tokens: int, now: float) -> float | None:
        """What so many take that wait. The silence by now counts: the pace may have changed."""
        known = self.intervals
        if self.backlog.num_served < _EVIDENCE or known.seconds + self._silence_s(now) <= 0:
            return None
        if known.seconds <= 0:
            known = known.with_samples(0, self._silence_s(now))
            return known.seconds_of(num_tokens, num_requests)
        scale = 1 + self._silence_s(now) / known.seconds
        return scale * known.seconds_of(num_tokens, num_requests)


class _Report(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    node: str = ""
    replica: int = 0
    sequence: int = 0


class CreditChanged(_Report, frozen=True, tag="credit"):
    """A replica granted credit, or returned that of a request: `num_left` may be sent to it now."""

    num_left: float = 0.0
    request_id: str = ""


class LoadReported(_Report, frozen=True, tag="load"):
    """The load of an engine after a step; the latest report counts."""

    load: EngineLoad


class QueueChanged(_Report, frozen=True, tag="queue"):
    """What waits in an operator."""

    backlog: Backlog


class FirstToken(_Report, frozen=True, tag="first_token"):
    """A first token came that long after its request left its queue. Of that, `computed_s` went by
    from when an engine began on its prompt, of which it computed `num_computed_tokens`; 0: unknown.
    `since_arrival_s`: after the request arrived; None where it is not the first of its answer.
    `slo_ttft_s`: the objective of the request for that.
    """

    seconds: float
    num_computed_tokens: int = 0
    computed_s: float = 0.0
    since_arrival_s: float | None = None
    slo_ttft_s: float | None = None


class RoomChanged(_Report, frozen=True, tag="room"):
    """Whether any service operator that requests enter next, after the operator that is told, has
    credit for a request. The core tells each subscriber (`node`) of its own at the end of an event.
    """

    has_room: bool


class HealthChanged(_Report, frozen=True, tag="health"):
    """The engine of a replica is there, or is lost or ejected."""

    is_up: bool


Feedback: TypeAlias = (
    CreditChanged | LoadReported | QueueChanged | FirstToken | RoomChanged | HealthChanged
)
KINDS: dict[type, str] = {
    kind: str(kind.__struct_config__.tag) for kind in Feedback.__args__
}  # the name by which an operator subscribes to a kind


class Topology(msgspec.Struct, frozen=True, tag="topology"):
    """Which replicas there are. `epoch` rises with each change.

    `num_replicas`: by engine, removed ones counted, so that numbers are 0 ... num_replicas - 1.
    `removed`: (engine, number) of those that will not come back.
    """

    epoch: int = 0
    num_replicas: dict[str, int] = {}
    removed: frozenset[tuple[str, int]] = frozenset()


class PrefixesChanged(msgspec.Struct, frozen=True, gc=False, tag="prefixes"):
    """Which replicas of an engine have which prefix blocks, by now: what operators are given that
    subscribe to "cache". The core keeps one index an engine, whoever asks.
    """

    engine: str
    index: PrefixIndex
