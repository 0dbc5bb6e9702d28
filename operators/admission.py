"""admission: accepts a request if it can be served in time, and refuses it otherwise.

The docstring of `AdmissionOptions` has the further limits that options set.

A request with several choices is judged once, when its first choice arrives; the verdict counts all
of its choices. If no request waits and an engine has room, every request is accepted: a refusal
would gain nothing, and served requests keep the measurements fresh. Otherwise a request may be
refused at once, with the time after which to try again, for one of these reasons:

    would_wait        it asked not to wait (`no_queue`)
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
Before eight requests have waited and been served, waiting prompts are predicted to take the time of
their prefills, and before eight measured prefills nothing is predicted. The prediction is
`Forecast` of `runtime/forecast.py`, which other operators may use, too.

A prompt counts with the tokens that must be computed. If engines report their prefix blocks, the
longest prefix that any replica has cached is subtracted, and the request carries its length to
later operators (`num_cached_tokens`). Engines report if this operator has a bound in tokens or an
objective, or if `pd_split` or a strategy of `route` asks for it.

Under load, less urgent requests are refused first. Of each bound (requests, tokens, objective) a
request may use a share that depends on its priority:

    critical 100 %   high 90 %   normal 80 %   low 60 %   background 40 %

The rest of each bound is kept for more urgent requests. A critical request is refused only at the
full bound, after all other priorities are refused. Predictions fluctuate, so for two seconds after
such a refusal the less urgent requests whose share is used up without the prompt of the refused
request are refused, too, even if engines have room. A refusal for an objective of the request's own
has no such effect.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import msgspec
from immutables import Map
from msgspec.structs import replace

from sagellm.graphs.vocabulary import REQUEST, OpSpec, Port
from sagellm.runtime.feedback import (
    Backlog,
    FirstToken,
    HealthChanged,
    LoadReported,
    PrefixesChanged,
    QueueChanged,
    Topology,
)
from sagellm.runtime.forecast import Forecast
from sagellm.runtime.messages import WOULD_WAIT, Request, refusal
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
from sagellm.runtime.service_limits import (
    ACCEPTED,
    Asked,
    InService,
    ServiceOptions,
    Shedding,
    says_share,
    service_of,
    share_of,
)

_RETRY_S = 1.0  # the `retry_after_s` of refusals before the queue's rate is known


@dataclass(frozen=True, slots=True)
class AdmissionOptions(ServiceOptions):
    """`max_queued`: the number of requests that may wait in `policy_sort`; further requests are
    refused.

    `max_queued_tokens`: the same bound in tokens, counting the uncached prompt and `max_tokens` of
    each choice; None: no bound. `slo_ttft_s`: the TTFT objective of requests that have none, for
    this operator and later operators; None: such requests have no objective.

    `ServiceOptions` has the limits of the requests in service.
    """

    max_queued: int = field(default=4096, metadata={"min": 1})
    max_queued_tokens: int | None = field(default=None, metadata={"min": 1})


SPEC = OpSpec(
    "admission",
    (Port("in", REQUEST),),
    (Port("out", REQUEST),),
    options=AdmissionOptions,
    subscribes=frozenset({"cache", "first_token", "health", "load", "queue", "topology"}),
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

    `service`: the requests in service, if an option limits them or the load of decode engines.
    `shedding`: which less urgent requests are refused because a more urgent one was.
    """

    forecast: Forecast = Forecast()
    verdicts: Map[str, AdmissionVerdict] = Map()
    indexes: Mapping[str, PrefixIndex] = {}
    service: InService | None = None
    shedding: Shedding | None = None


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
    service: InService | None = None  # before any request; None: no option limits it
    num_engines: int = 1  # replicas that requests enter next

    @property
    def initial(self) -> AdmissionState:
        objective_s, num_engines = self.options.slo_ttft_s, max(self.num_engines, 1)
        forecast = Forecast(objective_s=objective_s, num_engines=num_engines)
        return AdmissionState(forecast, service=self.service)

    @property
    def subscribes(self) -> frozenset[str]:
        """The feedback to subscribe to: only what the options need. Prefix blocks ("cache"): if an
        option needs the number of uncached tokens of every request.
        """
        wanted = {"first_token", "queue"}
        if self.options.max_queued_tokens is not None or self.options.slo_ttft_s is not None:
            wanted.add("cache")
        if self.options.limits_decode:
            wanted |= {"health", "load", "topology"}
        return frozenset(wanted)

    def on(
        self, state: AdmissionState, happened: Input, now: float, draw: Draw
    ) -> Step[AdmissionState]:
        match happened:
            case Arrival(item=Request() as request):
                if state.indexes and self.lookup is not None:
                    request = self.lookup.looked_up(request, state.indexes)
                return self._arrive(state, request, now)
            case QueueChanged():
                return Step(replace(state, forecast=state.forecast.after(happened, now)))
            case FirstToken():
                state = replace(state, forecast=state.forecast.after(happened, now))
                return Step(_served(state, happened, now))
            case LoadReported() | HealthChanged() | Topology():
                return Step(_served(state, happened, now))
            case PrefixesChanged(engine=engine, index=index):
                return Step(replace(state, indexes={**state.indexes, engine: index}))
            case Signal(kind="forget", request_id=request_id):
                return Step(_forgotten(state, request_id, now))
        return Step(state)

    def keeps(self, state: AdmissionState, request_id: str) -> bool:
        service = state.service
        return request_id in state.verdicts or (service is not None and service.holds(request_id))

    def _arrive(self, state: AdmissionState, request: Request, now: float) -> Step[AdmissionState]:
        if request.expires_s is not None and request.expires_s <= now:
            late = f"{self.name}: it expired before it was admitted: allow it more time"
            return Step(state, (Terminate(refusal(request, "expired", now=now, error=late)),))
        verdict = state.verdicts.get(request.request_id)
        if verdict is None:
            state, verdict = self._judge(state, request, now)
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
            request = replace(request, slo_ttft_s=self.options.slo_ttft_s)
        return Emit(request)

    def _judge(
        self, state: AdmissionState, request: Request, now: float
    ) -> tuple[AdmissionState, AdmissionVerdict]:
        """The verdict on a request, and the state in which an accepted request is in service."""
        num_choices, pace = max(request.sampling.n, 1), state.forecast.pace
        code, error = ACCEPTED
        first_s = 0.0
        # A request that enters again, after the loss of an engine, is in service already.
        service = None if request.epoch else state.service
        if service is not None:
            first_s = now + (pace.wait_s(now) or 0.0) + state.forecast.first_token_s(request)
            code, error = service.refusal(Asked(num_choices, share_of(request), now, first_s))
            error = error and f"{error}{says_share(request)}: try again later"
        shedding = state.shedding
        if not code and shedding is not None and shedding.refuses(request.priority, now):
            code, error = "queue_full", "more urgent requests are refused: try again later"
        elif not code and not pace.backlog.is_open:
            code, error, share = self._refusal(state, request, now)
            if share is not None:
                shedding = (shedding or Shedding()).refused(request.priority, share, now)
                state = replace(state, shedding=shedding)
        if service is not None and not code:
            state = replace(state, service=service.admitted(request, first_s))
        retry_after_s = (pace.wait_s(now) or _RETRY_S) if code else None
        error = error and f"{self.name}: {error}"
        return state, AdmissionVerdict(code, error, retry_after_s, num_choices)

    def _refusal(
        self, state: AdmissionState, request: Request, now: float
    ) -> tuple[str, str, float | None]:
        """The code and the reason of a refusal by the queue; two empty texts if the request is
        accepted. Last, the part of the bound that waiting requests use up, if others are to be
        refused, too.
        """
        forecast, options = state.forecast, self.options
        if request.is_impatient:
            return "would_wait", WOULD_WAIT, None
        # If nothing waits, a request may exceed the bound in tokens: a long prompt could otherwise
        # never be served.
        backlog = forecast.pace.backlog
        full = self._overflow(backlog, request) if backlog.num_requests else ""
        if full:
            return "queue_full", full, share_of(request)
        objective_s = request.slo_ttft_s or options.slo_ttft_s
        predicted_s = forecast.ttft_s(request, now) if objective_s is not None else None
        if objective_s is None or predicted_s is None:
            return "", "", None
        if predicted_s <= share_of(request) * objective_s:
            return "", "", None
        own_s = forecast.prefill_s(request.num_uncached_tokens) or 0.0
        used = (predicted_s - own_s) / objective_s if objective_s == options.slo_ttft_s else None
        error = (
            f"its first token might take {predicted_s:.1f} s, and the objective is "
            f"{objective_s:g} s{says_share(request)}: try again later"
        )
        return "slo_unreachable", error, used

    def _overflow(self, backlog: Backlog, request: Request) -> str:
        options, share = self.options, share_of(request)
        num_choices = max(request.sampling.n, 1)
        if backlog.num_requests + num_choices > math.ceil(share * options.max_queued):
            return (
                f"{backlog.num_requests} requests wait already (max_queued={options.max_queued}"
                f"{says_share(request)}): try again later, or raise max_queued"
            )
        most = options.max_queued_tokens
        num_tokens = num_choices * (request.num_uncached_tokens + request.sampling.max_tokens)
        if most is not None and backlog.num_tokens + num_tokens > share * most:
            return (
                f"requests of {backlog.num_tokens} tokens wait already, and this one has "
                f"{num_tokens} (max_queued_tokens={most}{says_share(request)}): "
                "try again later, or raise max_queued_tokens"
            )
        return ""


def _counted_down(
    verdicts: Map[str, AdmissionVerdict], request_id: str, verdict: AdmissionVerdict
) -> Map[str, AdmissionVerdict]:
    """The verdicts after one more choice of the request has arrived. After its last choice the
    request's verdict is removed.
    """
    if verdict.num_left <= 1:
        return _without(verdicts, request_id)
    rest = replace(verdict, num_left=verdict.num_left - 1)
    return verdicts.set(request_id, rest)


def _without(verdicts: Map[str, AdmissionVerdict], request_id: str) -> Map[str, AdmissionVerdict]:
    return verdicts.delete(request_id) if request_id in verdicts else verdicts


def _with_verdicts(state: AdmissionState, verdicts: Map[str, AdmissionVerdict]) -> AdmissionState:
    return state if verdicts is state.verdicts else replace(state, verdicts=verdicts)


def _forgotten(state: AdmissionState, request_id: str, now: float) -> AdmissionState:
    """The state after a request has ended."""
    if state.service is not None:
        state = replace(state, service=state.service.ended(request_id, now))
    return _with_verdicts(state, _without(state.verdicts, request_id))


def _served(
    state: AdmissionState,
    happened: FirstToken | LoadReported | HealthChanged | Topology,
    now: float,
) -> AdmissionState:
    """The state after a report that limits may depend on."""
    service = state.service
    return state if service is None else replace(state, service=service.after(happened, now))


def build(options: AdmissionOptions, setup: Setup) -> Admission:
    """Make the operator. Raises ValueError for options that contradict each other."""
    service = service_of(options, setup)
    entered = {one.engine or one.node: one.num_replicas for one in setup.targets if one.is_next}
    lookup = PrefixLookup.of(setup)
    return Admission(setup.name, options, lookup, service, sum(entered.values()))
