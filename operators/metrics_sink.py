"""metrics_sink: emits events, answers and embeddings unchanged; measures tokens, TTFT and ITL."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

import msgspec
from immutables import Map
from msgspec import field
from msgspec.structs import replace

from sagellm.graphs.vocabulary import NoOptions, OpSpec, Port
from sagellm.runtime.containers import LogHistogram
from sagellm.runtime.handover import Phases, phases_of
from sagellm.runtime.messages import Answer, Item, TokenEvent
from sagellm.runtime.operator import Arrival, Draw, Emit, EmitAll, Input, Setup, Signal, Step

SPEC = OpSpec(
    "metrics_sink",
    (Port("in", "event|answer|embedding"),),
    (Port("out", "same"),),
    options=NoOptions,
    signals=frozenset({"forget"}),
)


class TokenTimes(NamedTuple):
    """When the first and the latest tokens of one choice arrived here, in seconds."""

    first_s: float
    last_s: float


@dataclass(frozen=True, slots=True)
class SinkStatistics:
    """Statistics of all items so far. Quantiles have an error of at most 1 %; None: no samples.

    TTFT: from the request's arrival in the graph to its first token here. ITL: the time between two
    successive arrivals of tokens of one choice; the tokens of one engine step arrive together, and
    count as one. `phases`: means over the requests that ended here. `elapsed_s`: from the first
    arrival to the last event.
    """

    num_requests: int
    ended: Mapping[str, int]  # finish reason -> requests
    num_prompt_tokens: int
    num_tokens: int
    elapsed_s: float
    ttft_p50_s: float | None
    ttft_p99_s: float | None
    itl_p50_s: float | None
    itl_p99_s: float | None
    phases: Phases

    @property
    def tokens_per_s(self) -> float:
        return self.num_tokens / self.elapsed_s if self.elapsed_s > 0 else 0.0


_NO_TIMES: Mapping[int, TokenTimes] = {}
UnderWay: TypeAlias = Map[str, Mapping[int, TokenTimes]]


class SinkState(msgspec.Struct, frozen=True):
    """The state of the operator: sums, histograms, and the token times of running choices."""

    ended: Mapping[str, int] = field(default_factory=dict)
    num_prompt_tokens: int = 0
    num_tokens: int = 0
    since_s: float | None = None
    until_s: float = 0.0
    ttft: LogHistogram = field(default_factory=LogHistogram)
    itl: LogHistogram = field(default_factory=LogHistogram)
    phases: Phases = field(default_factory=Phases)
    under_way: UnderWay = Map()

    def with_events(self, events: Sequence[TokenEvent], now: float) -> "SinkState":
        """The state after the events of one engine step."""
        # One mutation for all events of a step costs less than a new map for each event.
        under_way = self.under_way.mutate()
        gaps: list[float] = []
        ended: list[tuple[TokenEvent, TokenTimes | None]] = []
        num_tokens = self.num_tokens
        for event in events:
            known = under_way.get(event.request_id, _NO_TIMES)
            times, num_new = known.get(event.choice), event.num_tokens
            if num_new:
                num_tokens += num_new
                if times is not None:
                    gaps.append(now - times.last_s)
                times = TokenTimes(times.first_s if times is not None else now, now)
            if event.finish_reason is not None:
                ended.append((event, times))
                rest = {choice: known[choice] for choice in known if choice != event.choice}
                if rest:
                    under_way[event.request_id] = rest
                elif known:
                    del under_way[event.request_id]
            elif times is not None:
                under_way[event.request_id] = {**known, event.choice: times}
        itl = self.itl.with_samples(gaps) if gaps else self.itl
        after = replace(
            self, num_tokens=num_tokens, until_s=now, itl=itl, under_way=under_way.finish()
        )
        for event, times in ended:
            after = after._with_end(event, times)
        return after

    def with_answer(self, answer: Answer, now: float) -> "SinkState":
        """The state after a whole answer: with a TTFT sample by its stamps, and no ITL sample."""
        sampled_s = answer.stamps.prefilled_s
        times = None if sampled_s is None else TokenTimes(sampled_s, now)
        num_tokens = self.num_tokens + answer.num_tokens
        return replace(self, num_tokens=num_tokens, until_s=now)._with_end(answer, times)

    def without_request(self, request_id: str) -> "SinkState":
        if request_id not in self.under_way:
            return self
        return replace(self, under_way=self.under_way.delete(request_id))

    def _with_end(self, last: TokenEvent | Answer, times: TokenTimes | None) -> "SinkState":
        reason = last.finish_reason or "stop"
        arrived_s = last.stamps.arrived_s
        since_s = arrived_s if self.since_s is None else min(self.since_s, arrived_s)
        ttft = self.ttft.with_sample(times.first_s - arrived_s) if times else self.ttft
        return replace(
            self,
            ended={**self.ended, reason: self.ended.get(reason, 0) + 1},
            num_prompt_tokens=self.num_prompt_tokens + last.num_prompt_tokens,
            since_s=since_s,
            ttft=ttft,
            phases=self.phases.plus(phases_of(last.stamps)),
        )


def statistics(state: SinkState) -> SinkStatistics:
    """The statistics of a state.

    Requests that ended before they reached an engine (refused, expired in the queue) are not
    counted: their events take the `terminal` outlet, and do not pass through this operator.
    """
    num_requests = sum(state.ended.values())
    return SinkStatistics(
        num_requests=num_requests,
        ended=state.ended,
        num_prompt_tokens=state.num_prompt_tokens,
        num_tokens=state.num_tokens,
        elapsed_s=0.0 if state.since_s is None else state.until_s - state.since_s,
        ttft_p50_s=state.ttft.quantile(0.5),
        ttft_p99_s=state.ttft.quantile(0.99),
        itl_p50_s=state.itl.quantile(0.5),
        itl_p99_s=state.itl.quantile(0.99),
        phases=Phases(*(total / max(num_requests, 1) for total in state.phases)),
    )


class MetricsSink:
    """Counts and times every item, and emits it unchanged."""

    @property
    def initial(self) -> SinkState:
        return SinkState()

    def on(self, state: SinkState, happened: Input, now: float, draw: Draw) -> Step[SinkState]:
        match happened:
            case Arrival(item=item):
                return Step(_counted(state, item, now), (Emit(item),))
            case Signal(kind="forget", request_id=request_id):
                return Step(state.without_request(request_id))
        return Step(state)

    def keeps(self, state: SinkState, request_id: str) -> bool:
        return request_id in state.under_way

    def on_batch(
        self, state: SinkState, items: Sequence[Item], now: float, draw: Draw
    ) -> Step[SinkState]:
        events = [item for item in items if isinstance(item, TokenEvent)]
        if len(events) == len(items):
            return Step(state.with_events(events, now), (EmitAll(items),))
        for item in items:
            state = _counted(state, item, now)
        return Step(state, (EmitAll(items),))


def _counted(state: SinkState, item: Item, now: float) -> SinkState:
    match item:
        case TokenEvent():
            return state.with_events((item,), now)
        case Answer():
            return state.with_answer(item, now)
    return state


def build(options: NoOptions, setup: Setup) -> MetricsSink:
    return MetricsSink()
