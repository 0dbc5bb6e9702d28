"""admission: accepts a request if it can be served in time, and refuses it otherwise.

A request with several choices is judged once, when its first choice arrives; the verdict counts all
of its choices. If no request waits and an engine has room, every request is accepted: a refusal
would gain nothing, and served requests keep the measurements fresh. Otherwise a request may be
refused at once, with the time after which to try again, for one of two reasons:

    queue_full        others wait, and with the request more than `max_queued` requests, or more
                      than `max_queued_tokens` tokens, would wait
    slo_unreachable   the objective is shorter than the predicted time to first token:
                      time waited so far + wait + first token. `wait` is the longer of
                      (waiting prompt tokens / tokens served per second) * margin
                      and the predicted time until the next request leaves the queue

The prediction assumes that all waiting requests are served before the new request. If `policy_sort`
serves by objective (slo_aware), waiting requests without an objective are not counted. The service
rate is that of the requests that left the queue while requests waited or engines were full, over
the last two seconds of such time, or over the last eight requests if those took longer. Several
queues count as one queue with their mean rate. The margin is three standard deviations of such a
wait: 1 + 3 / sqrt(waiting requests). The time until the next departure is predicted from the latest
32 gaps between departures: answers of equal length that began together end together, so the next
request may leave only a whole answer later.

The first token takes the mean measured time from the queue to the first token. After eight measured
prefills this time is corrected by the difference between the request's predicted prefill and the
mean prefill. If first tokens still come later than `slo_ttft_s`, waits are multiplied by a
correction from 1 to 4, which grows by 25 % after each late first token and falls by 0.5 % after
each first token in time. Requests with an objective of their own do not change the correction.
Nothing is predicted before eight requests have waited and been served. The prediction is `Forecast`
of `runtime/forecast.py`, which other operators may use, too.

A prompt counts with the tokens that must be computed. If engines report their prefix blocks, the
longest prefix that any replica has cached is subtracted, and the request carries its length to
later operators (`num_cached_tokens`). Engines report if this operator has a bound in tokens or an
objective, or if `pd_split` or a strategy of `route` asks for it.

Under load, less urgent requests are refused first. Of each bound (requests, tokens, objective) a
request may use a share that depends on its priority:

    critical 100 %   high 90 %   normal 80 %   low 60 %   background 40 %

The rest of each bound is kept for more urgent requests. A critical request is refused only at the
full bound, after all other priorities are refused.
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
_RETRY_S = 1.0  # the `retry_after_s` of refusals before the queue's rate is known


@dataclass(frozen=True, slots=True)
class AdmissionOptions:
    """`max_queued`: the number of requests that may wait in `policy_sort`; further requests are
    refused.

    `max_queued_tokens`: the same bound in tokens, counting the uncached prompt and `max_tokens` of
    each choice; None: no bound. `slo_ttft_s`: the TTFT objective of requests that have none, for
    this operator and later operators; None: such requests have no objective.
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
    decides="admission",
)


class AdmissionVerdict(msgspec.Struct, frozen=True):
    """The decision on a request. An empty `code` means accepted; otherwise `code` and `error` are
    the reason of the refusal. `num_left`: choices of the request that have not arrived yet.
    """

    code: str = ""
    error: str = ""
    retry_after_s: float | None = None
    num_left: int = 0


class AdmissionState(msgspec.Struct, frozen=True):
    """The state of the operator. `verdicts`: by request id, while choices of the request are still
    to arrive. `indexes`: the prefix blocks of each engine.
    """

    forecast: Forecast = Forecast()
    verdicts: Map[str, AdmissionVerdict] = Map()
    indexes: Mapping[str, PrefixIndex] = {}


@dataclass(frozen=True, slots=True)
class Admission:
    """Accepts or refuses each arriving request by the reported backlog and its forecast.

    In one region the backlog is exact at every arrival: the executor takes the next input only
    after all effects of the previous input, feedback included. Requests that wait between admission
    and the queue (in a map with an async function) are not counted yet; the credit of that map
    bounds their number. If no operator downstream reports "queue", every request is accepted: the
    source is then held back by credit, so that no queue grows without bound.
    """

    name: str
    options: AdmissionOptions
    lookup: PrefixLookup | None = None

    @property
    def initial(self) -> AdmissionState:
        return AdmissionState(Forecast(objective_s=self.options.slo_ttft_s))

    @property
    def subscribes(self) -> frozenset[str]:
        """The feedback to subscribe to: prefix blocks ("cache") only if an option needs the number
        of uncached tokens of every request.
        """
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
        """The code and the reason of a refusal; two empty texts if the request is accepted."""
        backlog = forecast.pace.backlog
        # If nothing waits, a request may exceed the bound in tokens: a long prompt could otherwise
        # never be served.
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
    """The share of each bound that the request may use. A priority outside 0 to 4 counts as the
    nearest one.
    """
    return SHARES[min(max(request.priority, 0), len(SHARES) - 1)]


def _says_share(request: Request) -> str:
    share = _share(request)
    return "" if share == 1 else f", of which priority {request.priority} may use {share:.0%}"


def _counted_down(
    verdicts: Map[str, AdmissionVerdict], request_id: str, verdict: AdmissionVerdict
) -> Map[str, AdmissionVerdict]:
    """The verdicts after one more choice of the request has arrived. After its last choice the
    request's verdict is removed.
    """
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
