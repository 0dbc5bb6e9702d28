"""The path of each request through a graph, from the decisions of its core: which phase took which
time.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from sagellm.runtime.core.decision_log import shown_effects
from sagellm.runtime.core.effects import Deliver, Effect, Send
from sagellm.runtime.core.events import Arrived, Event, Preempted
from sagellm.runtime.messages import ChoiceKey, FinishReason, Prefilled, Request, TokenEvent

QUEUE, ENGINE_QUEUE, PREFILL, DECODE = "queue", "engine queue", "prefill", "decode"
_TRANSFER = "transfer"
PHASES = (QUEUE, ENGINE_QUEUE, PREFILL, _TRANSFER, DECODE)


class PathPhase(NamedTuple):
    """One phase of a request, in seconds of the log's clock. `where`: operator[replica], or empty
    before the first.
    """

    name: str
    begin_s: float
    end_s: float
    where: str = ""

    @property
    def seconds(self) -> float:
        return self.end_s - self.begin_s


@dataclass(slots=True)
class RequestPath:
    """One choice of a request, from its arrival to its end.

    `phases` follow each other without gaps, so they sum to the whole time. `slo_ttft_s`: its
    objective for the first token. `operators`: those to which it was sent, in order.
    """

    request_id: str
    choice: int
    arrived_s: float
    slo_ttft_s: float | None
    phases: list[PathPhase] = field(default_factory=list)
    first_s: float | None = None
    ended_s: float = 0.0
    end: str = ""
    num_prompt_tokens: int = 0
    num_tokens: int = 0
    place: str = ""  # the operator[replica] that has it
    num_preempted: int = 0
    operators: list[str] = field(default_factory=list)

    @property
    def e2e_s(self) -> float:
        return self.ended_s - self.arrived_s

    @property
    def ttft_s(self) -> float | None:
        return None if self.first_s is None else self.first_s - self.arrived_s

    @property
    def ttft_slack_s(self) -> float | None:
        """The time that was left until the objective; negative: missed. None without both."""
        if self.slo_ttft_s is None or self.ttft_s is None:
            return None
        return self.slo_ttft_s - self.ttft_s

    def totals(self) -> dict[str, float]:
        """The seconds in each phase, in the order in which they were entered."""
        found: dict[str, float] = {}
        for phase in self.phases:
            found[phase.name] = found.get(phase.name, 0.0) + phase.seconds
        return found

    def before_first_token(self) -> dict[str, float]:
        """The seconds in each phase until the first token."""
        found: dict[str, float] = {}
        for phase in self.phases:
            if self.first_s is not None and phase.begin_s < self.first_s:
                seconds = min(phase.end_s, self.first_s) - phase.begin_s
                found[phase.name] = found.get(phase.name, 0.0) + seconds
        return found

    def enter(
        self, operator: str, replica: int, now: float, started_s: float | None = None
    ) -> None:
        """Record that the request was sent to an operator. `started_s`: when the engine before it
        began to compute.
        """
        if _TRANSFER in self.place:  # the first token has the stamps of the engine before
            started_s = None
        if started_s is not None and self._begun_s < started_s <= now:
            self._add(ENGINE_QUEUE, started_s)
        self._close(now)
        self.place = f"{operator}[{replica}]"
        if operator not in self.operators:
            self.operators.append(operator)

    def leave(self, now: float) -> None:
        """Record that the request was preempted, and waits again."""
        self._close(now)
        self.place = ""
        self.num_preempted += 1

    def deliver(
        self, num_tokens: int, started_s: float | None, end: FinishReason | None, now: float
    ) -> None:
        """Record tokens, or the end, that reached the sink. `started_s`: when the engine began to
        compute the prompt.
        """
        if num_tokens and self.first_s is None:
            self._first(started_s, now)
        self.num_tokens += num_tokens
        if end is not None:
            self._close(now)
            self.ended_s, self.end = now, end

    def _first(self, started_s: float | None, now: float) -> None:
        """Split the time in the engine at the beginning of the computation and at the token."""
        begun_s = self._begun_s
        if started_s is not None and begun_s < started_s <= now:
            self._add(ENGINE_QUEUE, started_s)
        self._add(PREFILL, now)
        self.first_s = now

    @property
    def _begun_s(self) -> float:
        """When the phase under way began."""
        return self.phases[-1].end_s if self.phases else self.arrived_s

    def _close(self, now: float) -> None:
        """End the phase under way."""
        if not self.place:
            self._add(QUEUE, now)
        elif _TRANSFER in self.place:
            self._add(_TRANSFER, now)
        else:
            self._add(PREFILL if self.first_s is None else DECODE, now)

    def _add(self, name: str, end_s: float) -> None:
        begun_s = self._begun_s
        if end_s > begun_s:
            self.phases.append(PathPhase(name, begun_s, end_s, self.place))


class PathTracker:
    """Follows the requests of a graph by the decisions of its core, and calls `ended` with the path
    of each choice that has ended.
    """

    def __init__(self, ended: Callable[[RequestPath], None]) -> None:
        self._ended = ended
        self._open: dict[ChoiceKey, RequestPath] = {}

    def observe(self, now: float, event: Event, effects: Sequence[Effect]) -> None:
        """Take one event and its effects, as an executor records them."""
        self.begin(now, event)
        for effect in effects:
            if isinstance(effect, Send):
                item = effect.item
                first = item.first if isinstance(item, Prefilled) else None
                started_s = None if first is None else first.stamps.started_s
                if isinstance(item, Request | Prefilled):
                    self.send(item.key, effect.node, effect.replica, started_s, now)
            elif isinstance(effect, Deliver) and isinstance(effect.item, TokenEvent):
                one = effect.item
                self.deliver(
                    one.key, one.num_tokens, one.num_prompt_tokens, one.stamps.started_s,
                    one.finish_reason, now,
                )  # fmt: skip

    def begin(self, now: float, event: Event) -> None:
        """Take an event before its effects."""
        if isinstance(event, Arrived):
            for request in event.requests:
                self._open[request.key] = RequestPath(
                    request.request_id, request.choice, request.stamps.arrived_s, request.slo_ttft_s
                )
        elif isinstance(event, Preempted) and event.request.key in self._open:
            self._open[event.request.key].leave(now)

    def send(
        self, key: ChoiceKey, node: str, replica: int, started_s: float | None, now: float
    ) -> None:
        path = self._open.get(key)
        if path is not None:
            path.enter(node, replica, now, started_s)

    def deliver(
        self,
        key: ChoiceKey,
        num_tokens: int,
        num_prompt_tokens: int,
        started_s: float | None,
        end: FinishReason | None,
        now: float,
    ) -> None:
        path = self._open.get(key)
        if path is None:
            return
        path.num_prompt_tokens = max(path.num_prompt_tokens, num_prompt_tokens)
        path.deliver(num_tokens, started_s, end, now)
        if end is not None:
            del self._open[key]
            self._ended(path)


def request_paths(log: Iterable[tuple[float, Event, bytes]]) -> Iterator[RequestPath]:
    """The path of each choice, when it has ended. `log`: a DecisionReader. Raises LogError."""
    ended: list[RequestPath] = []
    tracker = PathTracker(ended.append)
    for now, event, effects in log:
        tracker.begin(now, event)
        for effect in shown_effects(effects):
            if effect[0] == "send":
                _send(tracker, effect, now)
            elif effect[0] == "deliver" and "position" in effect[1]:
                _deliver(tracker, effect[1], now)
        yield from ended
        ended.clear()


def _send(tracker: PathTracker, effect: list[Any], now: float) -> None:
    _, node, replica, item = effect
    if "position" not in item:  # tokens stay in the phase of their request
        first = item.get("first")
        started_s = None if first is None else first["stamps"]["started_s"]
        tracker.send(_key(item.get("request", item)), node, replica, started_s, now)


def _deliver(tracker: PathTracker, event: Mapping[str, Any], now: float) -> None:
    num_tokens = len(event["token_ids"]) + event["num_tokens_without_ids"]
    started_s, end = event["stamps"]["started_s"], event["finish_reason"]
    tracker.deliver(_key(event), num_tokens, event["num_prompt_tokens"], started_s, end, now)


def _key(item: Mapping[str, Any]) -> ChoiceKey:
    return item["request_id"], item["choice"]


def perfetto_events(paths: Iterable[RequestPath]) -> Iterator[dict[str, Any]]:
    """The events of a trace file that https://ui.perfetto.dev opens: a track for each operator's
    replica, and a slice for each phase. Times are microseconds.
    """
    tracks: dict[str, int] = {}
    for path in paths:
        name = f"{path.request_id}/{path.choice}"
        for phase in path.phases:
            where = phase.where or QUEUE
            track = tracks.get(where)
            if track is None:
                track = tracks[where] = len(tracks) + 1
                yield {"ph": "M", "name": "process_name", "pid": track, "args": {"name": where}}
            common = {"cat": phase.name, "id": name, "name": f"{name} {phase.name}", "pid": track}
            yield {**common, "ph": "b", "ts": phase.begin_s * 1e6}
            yield {**common, "ph": "e", "ts": phase.end_s * 1e6}
