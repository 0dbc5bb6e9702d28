"""What waits in a queue, as it tells those before it, and how long a newcomer would wait there."""

import math
from collections.abc import Collection

import msgspec
from msgspec.structs import astuple, replace

from sagellm.runtime.line_fit import LineFit

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


def together(backlogs: Collection[Backlog]) -> Backlog:
    """What waits in several queues; what they served, and how long they were busy, adds up."""
    if len(backlogs) == 1:
        return next(iter(backlogs))
    return Backlog(*map(sum, zip(*map(astuple, backlogs), strict=True)))


class Pace(msgspec.Struct, frozen=True):
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

    def with_backlog(self, backlog: Backlog, now: float) -> "Pace":
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

    def with_first_token(self, seconds: float) -> "Pace":
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
