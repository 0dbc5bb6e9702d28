"""The load of decode engines at a later time, predicted from the requests that will decode then."""

import math
from collections.abc import Mapping

import msgspec
from immutables import Map
from msgspec.structs import replace

from sagellm.runtime.feedback import HealthChanged, LoadReported, Topology
from sagellm.runtime.forecast import LineFit
from sagellm.runtime.messages import EngineReplica, Request
from sagellm.runtime.operator import Target

_MIN_ANSWERS = 8  # answers that have ended before their duration is predicted
_FADE = 1 - 1 / 64  # factor on the weight of earlier samples, with each new sample


class MeasuredSteps(msgspec.Struct, frozen=True):
    """The time of a step by the number of running sequences, measured over several replicas.

    `latest`: by (operator, replica), the number of the latest reported step, the time of the
    report, and the running sequences.
    """

    fit: LineFit = LineFit()
    latest: Map[tuple[str, int], tuple[int, float, int]] = Map()

    def after(self, reported: LoadReported, now: float) -> "MeasuredSteps":
        """The times with one more report of an engine's load."""
        load, place = reported.load, (reported.node, reported.replica)
        num_before, before_s, _ = self.latest.get(place, (0, math.inf, 0))
        # After an idle phase the time between reports is not step time: infinity excludes it.
        seen = load.num_steps, now if load.num_running else math.inf, load.num_running
        fit, num_steps = self.fit, load.num_steps - num_before
        if num_steps > 0 and now > before_s:
            num_rows = num_steps * max(load.num_running, 1)
            fit = fit.with_samples(num_rows, now - before_s, count=num_steps, kept=_FADE)
        return MeasuredSteps(fit, self.latest.set(place, seen))

    def step_s(self, num_running: float) -> float | None:
        """The time of a step with `num_running` sequences; None if no step was measured."""
        if not self.fit.weight:
            return None
        return self.fit.seconds_of(num_running, through_origin=False)

    def num_within(self, seconds: float) -> float | None:
        """The most sequences of a replica whose steps take `seconds`; None if none was measured."""
        return self.fit.tokens_within(seconds) if self.fit.weight else None

    def num_running(self, nodes: frozenset[str]) -> int:
        """The running sequences of all replicas of some operators, by their latest reports."""
        return sum(one[2] for (node, _), one in self.latest.items() if node in nodes)


class AdmittedRequest(msgspec.Struct, frozen=True, gc=False):
    """A request that was admitted and has not ended.

    `first_s`: the time of its first token, predicted until `has_begun`.
    """

    num_sequences: int
    num_prompt_tokens: int
    max_tokens: int
    first_s: float
    has_begun: bool = False


class PredictedLoad(msgspec.Struct, frozen=True):
    """The sequences that decode at one time, and the tokens in their KV blocks."""

    num_sequences: float = 0
    num_tokens: float = 0.0


class DecodeLoad(msgspec.Struct, frozen=True):
    """Predicts how many sequences will decode at a later time. Immutable.

    All admitted requests count until their predicted end: the requests whose prompts are still
    computed will decode, too. An answer ends `answers` seconds after its first token, by its
    `max_tokens`: a fit of the measured times of ended answers, which covers answers that end early.
    Until eight answers have ended, no end is predicted. An answer that is overdue counts until its
    end. A prediction takes time linear in the open requests.

    Source: the system-level prediction of Mooncake (FAST 2025, section 7.4), which takes one time
    for all answers.
    """

    requests: Map[str, AdmittedRequest] = Map()
    num_open: int = 0  # sequences of these requests
    answers: LineFit = LineFit()
    num_answers: int = 0
    steps: MeasuredSteps = MeasuredSteps()

    def admitted(self, request: Request, first_s: float) -> "DecodeLoad":
        """The load with one more request, whose first token is predicted for `first_s`."""
        opened = AdmittedRequest(
            max(request.sampling.n, 1),
            len(request.prompt_token_ids),
            request.sampling.max_tokens,
            first_s,
        )
        known = self.requests.get(request.request_id)
        num_more = opened.num_sequences - (known.num_sequences if known is not None else 0)
        requests = self.requests.set(request.request_id, opened)
        return replace(self, requests=requests, num_open=self.num_open + num_more)

    def begun(self, request_id: str, now: float) -> "DecodeLoad":
        """The load after a first token of a request; unknown requests are ignored."""
        known = self.requests.get(request_id)
        if known is None or known.has_begun:
            return self
        begun = replace(known, first_s=now, has_begun=True)
        return replace(self, requests=self.requests.set(request_id, begun))

    def ended(self, request_id: str, now: float) -> "DecodeLoad":
        """The load without a request; the time since its first token is learned."""
        known = self.requests.get(request_id)
        if known is None:
            return self
        requests, answers, number = self.requests.delete(request_id), self.answers, self.num_answers
        if known.has_begun:
            seconds = now - known.first_s
            answers = answers.with_samples(known.max_tokens, seconds, kept=_FADE)
            number += 1
        num_open = self.num_open - known.num_sequences
        return DecodeLoad(requests, num_open, answers, number, self.steps)

    def reported(self, happened: LoadReported, now: float) -> "DecodeLoad":
        """The load with one more report of an engine that decodes."""
        return replace(self, steps=self.steps.after(happened, now))

    @property
    def current(self) -> PredictedLoad:
        """The requests that decode now."""
        begun = [one for one in self.requests.values() if one.has_begun]
        num_sequences = sum(one.num_sequences for one in begun)
        num_tokens = sum(one.num_sequences * one.num_prompt_tokens for one in begun)
        return PredictedLoad(num_sequences, num_tokens)

    def at(self, at_s: float, now: float) -> PredictedLoad:
        """The requests that will decode at time `at_s`, without those that arrive later."""
        num_sequences, num_tokens = 0, 0.0
        for one in self.requests.values():
            first_s = one.first_s if one.has_begun else max(one.first_s, now)
            lasts_s = self.lasts_s(one.max_tokens)
            ends_s = first_s + lasts_s
            if ends_s <= at_s and ends_s > now:
                continue
            share = min(max(at_s - first_s, 0.0) / lasts_s, 1.0) if lasts_s > 0 else 1.0
            num_sequences += one.num_sequences
            num_known = one.num_prompt_tokens + share * one.max_tokens
            num_tokens += one.num_sequences * num_known
        return PredictedLoad(num_sequences, num_tokens)

    def lasts_s(self, max_tokens: int) -> float:
        """The predicted time from the first token of an answer to its last one."""
        if self.num_answers < _MIN_ANSWERS:
            return math.inf
        return self.answers.seconds_of(max_tokens)


class UpReplicas(msgspec.Struct, frozen=True):
    """Which replicas of engines are up. `num_replicas`: by engine, as the topology says."""

    down: frozenset[tuple[str, int]] = frozenset()  # (operator, replica)
    num_replicas: Mapping[str, int] = {}
    removed: frozenset[EngineReplica] = frozenset()

    def after(self, happened: HealthChanged | Topology) -> "UpReplicas":
        """The replicas after a change of their health or number."""
        if isinstance(happened, Topology):
            return UpReplicas(self.down, happened.num_replicas, happened.removed)
        changed = frozenset({(happened.node, happened.replica)})
        down = self.down - changed if happened.is_up else self.down | changed
        return replace(self, down=down)

    def count(self, target: Target) -> int:
        """The number of replicas of a target that are up."""
        size = self.num_replicas.get(target.engine, target.num_replicas)
        gone = {number for node, number in self.down if node == target.node}
        gone |= {number for engine, number in self.removed if engine == target.engine}
        return size - len(gone)
