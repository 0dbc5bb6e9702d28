"""A forecast: how long requests take by now, as a value that operators keep and feed.

It is learned from feedback alone: an operator that subscribes to "queue", "first_token" or "load"
passes what it is given to `after`, and asks. What it has no evidence for is None.
"""

import math
from collections.abc import Mapping

import msgspec
from immutables import Map
from msgspec.structs import replace

from sagellm.runtime.feedback import (
    Backlog,
    FirstToken,
    LineFit,
    LoadReported,
    QueueChanged,
    QueuePace,
    combined,
)
from sagellm.runtime.messages import Request

_EVIDENCE = 8.0  # prefills that must have been seen before any is predicted
_FADE = 1 - 1 / 64  # of what is known of prefills, with each that is seen
_WEIGHT = 1 / 8  # of the latest step in the mean
_LATE = 1.25  # a late first token makes predicted waits longer by a quarter,
_IN_TIME = 0.995  # one in time makes them shorter again: in balance where 2 in 100 are late
_MOST_CORRECTED = 4.0


class Forecast(msgspec.Struct, frozen=True):
    """`pace` is that of all queues together, of which `backlogs` has the latest, by operator.

    `prefills`: of the latest. `step_s`: the mean time of an engine step while a replica was busy.
    `steps`: the number of each replica's latest step, and when it was reported. `correction`: what
    predicted waits are multiplied by, since first tokens came later than `objective_s` all the
    same: on a machine that others use, too, the pace falls after a request was let in. Requests
    with another objective say nothing: clients choose those, and must not delay each other by it.
    """

    pace: QueuePace = QueuePace()
    backlogs: Mapping[str, Backlog] = {}
    prefills: LineFit = LineFit()
    step_s: float | None = None
    steps: Map[tuple[str, int], tuple[int, float]] = Map()
    correction: float = 1.0
    objective_s: float | None = None

    def after(self, happened: QueueChanged | FirstToken | LoadReported, now: float) -> "Forecast":
        """The forecast with that feedback."""
        match happened:
            case QueueChanged(node=node, backlog=backlog):
                return self._with_backlog(node, backlog, now)
            case FirstToken():
                return self._with_first_token(happened)
            case LoadReported():
                return self._with_load(happened, now)

    def prefill_s(self, num_tokens: float) -> float | None:
        """What an engine takes to compute so many prompt tokens, beside what it does by now."""
        if self.prefills.weight < 0.9 * _EVIDENCE or self.prefills.tokens <= 0:
            return None
        return self.prefills.seconds_of(num_tokens)

    def first_token_s(self, request: Request) -> float:
        """From leaving the queue to the first token. As long as prefills are not predicted, the
        mean of all requests.
        """
        mean_s = self.pace.first_token_s
        own_s = self.prefill_s(request.num_uncached_tokens)
        if own_s is None:
            return mean_s
        usual_s = self.prefills.seconds / self.prefills.weight
        return max(mean_s - usual_s, 0.0) + own_s

    def ttft_s(self, request: Request, now: float) -> float | None:
        """From its arrival to its first token, for a request that enters the queue now: what all
        but a few in a hundred stay below.
        """
        wait_s = self.pace.long_wait_s(now)
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
        correction = self._corrected(first)
        return replace(self, pace=pace, prefills=prefills, correction=correction)

    def _corrected(self, first: FirstToken) -> float:
        since_s, objective_s = first.since_arrival_s, self.objective_s
        if since_s is None or objective_s is None or first.slo_ttft_s != objective_s:
            return self.correction
        changed = self.correction * (_LATE if since_s > objective_s else _IN_TIME)
        return min(max(changed, 1.0), _MOST_CORRECTED)

    def _with_load(self, reported: LoadReported, now: float) -> "Forecast":
        load, name = reported.load, (reported.node, reported.replica)
        before = self.steps.get(name)
        steps = self.steps.set(name, (load.num_steps, now if load.num_running else math.inf))
        step_s = self.step_s
        if before is not None and load.num_steps > before[0] and now > before[1]:
            latest_s = (now - before[1]) / (load.num_steps - before[0])
            step_s = latest_s if step_s is None else step_s + _WEIGHT * (latest_s - step_s)
        return replace(self, steps=steps, step_s=step_s)
