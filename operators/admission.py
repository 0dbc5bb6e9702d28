"""admission: accepts a request while it can be served in time, and refuses it otherwise.

A request with several choices is judged once, at the first choice, and counts with all of them.
Where nothing waits and an engine has room, every request is accepted: a refusal would gain nothing,
and served requests keep the measurements fresh. Otherwise a request is refused at once, with the
time after which to try again, for one of two reasons:

    queue_full        others wait, and with the request more than `max_queued` requests, or
                      `max_queued_tokens`, would wait
    slo_unreachable   the first token would come later than the objective allows:
                      waited + wait + first token, where wait is the longer of
                      (prompt tokens that wait / tokens served a second) * margin
                      and the rest of the current gap, the time until the next request leaves

The prediction counts all waiting requests as served before the new one; where `policy_sort` serves
by objective (slo_aware), it does not count those without an objective. The rate is that of requests
that left the queue while something waited or engines were full, over the last two such seconds, or
the last eight requests where those took longer. Several queues count as one queue of their mean
rate. The margin is three standard deviations of such a wait, 1 + 3 / sqrt(requests that wait). A
gap is predicted to end as the latest 32 gaps did: answers of equal length that began together end
together, and the next one ends a whole answer later.

The first token takes the mean time since a request left the queue, corrected by the difference of
the request's prefill from the mean prefill, once eight prefills have shown how long those take.
Where first tokens still come later than `slo_ttft_s`, waits are multiplied by a correction from 1
to 4: a quarter more after each late first token, half a hundredth less after each one in time.
Requests with an objective of their own do not change the correction. Nothing is predicted before
eight requests have waited and been served. The prediction is `Forecast` of `runtime/forecast.py`,
which other operators may use, too.

Tokens of a prompt are the tokens to compute. Where engines report their prefix blocks, the longest
cached prefix of any replica does not count, and the request carries it to later operators
(`num_cached_tokens`). Engines report if this operator has a bound in tokens or an objective, or if
`pd_split` or a strategy of `route` asks for it.

Under load the less urgent requests are refused first. Of each bound (requests, tokens, objective) a
priority may use

    critical 100 %   high 90 %   normal 80 %   low 60 %   background 40 %

so that the rest of the queue is kept for the more urgent. A critical request is refused only where
the queue is full, long after all others are refused.
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
_RETRY_S = 1.0  # told to clients before the queue's rate is known


@dataclass(frozen=True, slots=True)
class AdmissionOptions:
    """`max_queued`: requests that may wait in `policy_sort` before new ones are refused.

    `max_queued_tokens`: the same bound in tokens: the uncached prompt and `max_tokens` of each
    choice; None: no bound. `slo_ttft_s`: the objective of requests without one, for this operator
    and later ones; None: only requests with an objective of their own are refused for it.
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
    """Why a request is refused; without a `code` it is accepted. `num_left`: choices to come."""

    code: str = ""
    error: str = ""
    retry_after_s: float | None = None
    num_left: int = 0


class AdmissionState(msgspec.Struct, frozen=True):
    """The state: the forecast of waits, verdicts on requests with choices to come, and the prefix
    blocks of engines.
    """

    forecast: Forecast = Forecast()
    verdicts: Map[str, AdmissionVerdict] = Map()
    indexes: Mapping[str, PrefixIndex] = {}


@dataclass(frozen=True, slots=True)
class Admission:
    """Decides on each arriving request by the reported backlog and its forecast.

    In one region the backlog is exact at every arrival, because all effects of an input, feedback
    included, are over before the executor takes the next input. Requests in an operator between
    admission and the queue that can wait (a map with an async function) are not counted yet; the
    credit of that operator bounds their number. Where no operator downstream reports "queue", every
    request passes: nothing queues without bound, because credit holds back the source.
    """

    name: str
    options: AdmissionOptions
    lookup: PrefixLookup | None = None

    @property
    def initial(self) -> AdmissionState:
        return AdmissionState(Forecast(objective_s=self.options.slo_ttft_s))

    @property
    def subscribes(self) -> frozenset[str]:
        """Subscribe to prefix blocks only where every request's tokens are counted or predicted."""
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
        verdicts = _counted_down(state.verdicts, request.request_id, verdict)
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
        code, error = ("", "") if pace.backlog.is_open else self._refusal(forecast, request, now)
        retry_after_s = (pace.wait_s(now) or _RETRY_S) if code else None
        return AdmissionVerdict(code, error and f"{self.name}: {error}", retry_after_s, num_choices)

    def _refusal(self, forecast: Forecast, request: Request, now: float) -> tuple[str, str]:
        """Code and reason of a refusal; two empty texts where the request is accepted."""
        backlog = forecast.pace.backlog
        # A request alone may exceed the bound in tokens: it would never fit otherwise.
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
    """The share of each bound that the request may use; unknown priorities count as the nearest."""
    return SHARES[min(max(request.priority, 0), len(SHARES) - 1)]


def _says_share(request: Request) -> str:
    share = _share(request)
    return "" if share == 1 else f", of which priority {request.priority} may use {share:.0%}"


def _counted_down(
    verdicts: Map[str, AdmissionVerdict], request_id: str, verdict: AdmissionVerdict
) -> Map[str, AdmissionVerdict]:
    """The verdicts after one more choice of the request: dropped after the last choice."""
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
