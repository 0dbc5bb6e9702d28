"""admission: the door. Lets a request in while it can be served in time, and refuses it otherwise.

A request with several choices is judged once, at its first, and counts with all of them. Where
nothing waits and an engine has room, every request enters: a refusal would gain nothing, and what
is served keeps the evidence fresh. Otherwise it is refused, at once, with the time after which to
try again, where

    queue_full        behind others, more than `max_queued` requests, or `max_queued_tokens`, would
                      wait
    slo_unreachable   its first token would come later than its objective allows:
                      waited + wait + first token; wait is the longer of
                      (prompt tokens that wait / tokens served a second) * margin
                      the rest of this silence: of the time until the next request leaves

The prediction takes all that waits as ahead of the newcomer, but where `policy_sort` serves by
objective (slo_aware) not the requests that have none. Its rate is what left the queue while
something waited or engines were full, with a memory of two such seconds, or of eight requests where
those took longer; several queues count as one, as fast as their mean. The margin is three standard
deviations of such a wait, 1 + 3 / sqrt(requests that wait). A silence ends as the latest 32 did:
answers of equal length that began together end together, and the next comes a whole answer later.
The first token takes the mean time from leaving the queue, longer or shorter by what the prefill of
the request differs from the mean one, once eight prefills have shown how long those take. Where
first tokens come later than `slo_ttft_s` all the same, waits are multiplied by a correction from 1
to 4: a quarter more with each that is late, half a hundredth less with each in time. Requests that
bring an objective of their own do not change it. Before eight requests have waited and been served
nothing is predicted. All of it is the `Forecast` of
`runtime/forecast.py`, which other operators may keep, too.

Tokens of a prompt are those to be computed. Where engines report which prefix blocks they have, the
longest cached prefix that any replica has is left out, and the request says so to the operators
after this one (`num_cached_tokens`). They report where this operator has a bound in tokens or an
objective, where a strategy of `route` asks, or `pd_split`.

Under load the less urgent go first. Of each bound (requests, tokens, objective) a priority may use

    critical 100 %   high 90 %   normal 80 %   low 60 %   background 40 %

so that what is left of the queue is kept for the more urgent, and a critical request is refused
only where the queue is full, when all others have been refused for long.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import msgspec
from immutables import Map

from sagellm.graphs.vocabulary import REQUEST, OpSpec, Port
from sagellm.runtime.feedback import Backlog, FirstToken, PrefixesChanged, QueueChanged
from sagellm.runtime.forecast import Forecast
from sagellm.runtime.messages import Request, refusal
from sagellm.runtime.operator import (
    Arrival,
    Draw,
    Emit,
    Input,
    OperatorOutput,
    Setup,
    Signal,
    Step,
    Terminate,
)
from sagellm.runtime.prefixes import PrefixIndex, PrefixLookup

SHARES = (1.0, 0.9, 0.8, 0.6, 0.4)  # of each bound, by priority: 0 critical ... 4 background
_RETRY_S = 1.0  # where nothing is known of how fast the queue is served


@dataclass(frozen=True, slots=True)
class AdmissionOptions:
    """`max_queued`: requests that may wait in `policy_sort` before new ones are refused.

    `max_queued_tokens`: the same for tokens: the uncached prompt and `max_tokens` of each choice.
    None: no bound. `slo_ttft_s`: the objective of requests that bring none, for this operator and
    for those behind it. None: only requests with an objective of their own are refused for it.
    """

    max_queued: int = field(default=4096, metadata={"min": 1})
    max_queued_tokens: int | None = field(default=None, metadata={"min": 1})
    slo_ttft_s: float | None = field(default=None, metadata={"min": 1e-3})


SPEC = OpSpec(
    "admission",
    (Port("in", REQUEST),),
    (Port("out", REQUEST),),
    options=AdmissionOptions,
    subscribes=frozenset({"cache", "queue", "first_token"}),
    signals=frozenset({"forget"}),
)


class AdmissionVerdict(msgspec.Struct, frozen=True):
    """Why a request is refused; no code: it is not. `num_left` of its choices are still to come."""

    code: str = ""
    error: str = ""
    retry_after_s: float | None = None
    num_left: int = 0


class AdmissionState(msgspec.Struct, frozen=True):
    """The state: how fast the queues are served, verdicts on requests with choices to come, and the
    prefix blocks of engines.
    """

    forecast: Forecast = Forecast()
    verdicts: Map[str, AdmissionVerdict] = Map()
    indexes: Mapping[str, PrefixIndex] = {}


@dataclass(frozen=True, slots=True)
class Admission:
    """Inside one region what it knows of the queue is exact at every arrival: what an input caused,
    feedback included, is over before the executor takes the next input. Where an operator between
    the two can wait (a map with an async function), the requests in that operator are not counted
    yet; its credits bound how many that are. Where nothing downstream tells "queue", nothing waits
    unboundedly either, for the source itself is held back: everything passes.
    """

    name: str
    options: AdmissionOptions
    lookup: PrefixLookup | None = None

    @property
    def initial(self) -> AdmissionState:
        return AdmissionState(Forecast(objective_s=self.options.slo_ttft_s))

    @property
    def subscribes(self) -> frozenset[str]:
        """It asks for prefix blocks where it counts tokens, or predicts, for every request."""
        counts = self.options.max_queued_tokens is not None or self.options.slo_ttft_s is not None
        return SPEC.subscribes if counts else SPEC.subscribes - {"cache"}

    def on(
        self, state: AdmissionState, happened: Input, now: float, draw: Draw
    ) -> Step[AdmissionState]:
        match happened:
            case Arrival(item=Request() as request):
                if state.indexes and self.lookup is not None:
                    request = self.lookup.looked_up(request, state.indexes)
                return self._arrive(state, request, now)
            case QueueChanged() | FirstToken():
                forecast = state.forecast.after(happened, now)
                return Step(AdmissionState(forecast, state.verdicts, state.indexes))
            case PrefixesChanged(engine=engine, index=index):
                indexes = {**state.indexes, engine: index}
                return Step(AdmissionState(state.forecast, state.verdicts, indexes))
            case Signal(kind="forget", request_id=request_id):
                return Step(_with_verdicts(state, _without(state.verdicts, request_id)))
        return Step(state)

    def keeps(self, state: AdmissionState, request_id: str) -> bool:
        return request_id in state.verdicts

    def _arrive(self, state: AdmissionState, request: Request, now: float) -> Step[AdmissionState]:
        if request.expires_s is not None and request.expires_s <= now:
            late = f"{self.name}: it expired before it was admitted: allow it more time"
            return Step(state, (Terminate(refusal(request, "expired", now=now, error=late)),))
        verdict = state.verdicts.get(request.request_id) or self._judge(
            state.forecast, request, now
        )
        verdicts = _followed(state.verdicts, request.request_id, verdict)
        return Step(_with_verdicts(state, verdicts), (self._answer(request, verdict, now),))

    def _answer(self, request: Request, verdict: AdmissionVerdict, now: float) -> OperatorOutput:
        if verdict.code:
            event = refusal(
                request,
                "refused",
                now=now,
                error=verdict.error,
                code=verdict.code,
                retry_after_s=verdict.retry_after_s,
            )
            return Terminate(event)
        if request.slo_ttft_s is None and self.options.slo_ttft_s is not None:
            request = msgspec.structs.replace(request, slo_ttft_s=self.options.slo_ttft_s)
        return Emit(request)

    def _judge(self, forecast: Forecast, request: Request, now: float) -> AdmissionVerdict:
        num_choices, pace = max(request.sampling.n, 1), forecast.pace
        code, error = ("", "") if pace.backlog.is_open else self._fault(forecast, request, now)
        retry_after_s = (pace.wait_s(now) or _RETRY_S) if code else None
        return AdmissionVerdict(code, error and f"{self.name}: {error}", retry_after_s, num_choices)

    def _fault(self, forecast: Forecast, request: Request, now: float) -> tuple[str, str]:
        """Code and reason of a refusal, or nothing twice."""
        backlog = forecast.pace.backlog
        full = self._overflow(backlog, request) if backlog.num_requests else ""
        if full:
            return "queue_full", full
        objective_s = request.slo_ttft_s or self.options.slo_ttft_s
        predicted_s = forecast.ttft_s(request, now) if objective_s is not None else None
        if objective_s is None or predicted_s is None:
            return "", ""
        if predicted_s <= _share(request) * objective_s:
            return "", ""
        return "slo_unreachable", (
            f"its first token might take {predicted_s:.1f} s, and the objective is "
            f"{objective_s:g} s{_says_share(request)}: try again later"
        )

    def _overflow(self, backlog: Backlog, request: Request) -> str:
        options, share = self.options, _share(request)
        num_choices = max(request.sampling.n, 1)
        if backlog.num_requests + num_choices > math.ceil(share * options.max_queued):
            return (
                f"{backlog.num_requests} requests wait already (max_queued={options.max_queued}"
                f"{_says_share(request)}): try again later, or raise max_queued"
            )
        most = options.max_queued_tokens
        num_tokens = num_choices * (request.num_uncached_tokens + request.sampling.max_tokens)
        if most is not None and backlog.num_tokens + num_tokens > share * most:
            return (
                f"requests of {backlog.num_tokens} tokens wait already, and this one has "
                f"{num_tokens} (max_queued_tokens={most}{_says_share(request)}): "
                "try again later, or raise max_queued_tokens"
            )
        return ""


def _share(request: Request) -> float:
    return SHARES[min(max(request.priority, 0), len(SHARES) - 1)]


def _says_share(request: Request) -> str:
    share = _share(request)
    return "" if share == 1 else f", of which priority {request.priority} may use {share:.0%}"


def _followed(
    verdicts: Map[str, AdmissionVerdict], request_id: str, verdict: AdmissionVerdict
) -> Map[str, AdmissionVerdict]:
    """One choice fewer is to come."""
    if verdict.num_left <= 1:
        return _without(verdicts, request_id)
    rest = msgspec.structs.replace(verdict, num_left=verdict.num_left - 1)
    return verdicts.set(request_id, rest)


def _without(verdicts: Map[str, AdmissionVerdict], request_id: str) -> Map[str, AdmissionVerdict]:
    return verdicts.delete(request_id) if request_id in verdicts else verdicts


def _with_verdicts(state: AdmissionState, verdicts: Map[str, AdmissionVerdict]) -> AdmissionState:
    if verdicts is state.verdicts:
        return state
    return AdmissionState(state.forecast, verdicts, state.indexes)


def build(options: AdmissionOptions, setup: Setup) -> Admission:
    return Admission(setup.name, options, PrefixLookup.of(setup))
