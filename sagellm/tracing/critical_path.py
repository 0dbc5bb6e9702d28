"""The path of each request through a graph, from a decision log: which phase took which time."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from sagellm.runtime.core.decision_log import shown_effects
from sagellm.runtime.core.events import Arrived, Event, Preempted
from sagellm.runtime.messages import ChoiceKey, Request

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
    objective for the first token.
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

    def enter(self, where: str, now: float, started_s: float | None = None) -> None:
        """Record that the request was sent to an operator. `started_s`: when the engine before it
        began to compute.
        """
        if started_s is not None and self._begun_s < started_s <= now:
            self._add(ENGINE_QUEUE, started_s)
        self._close(now)
        self.place = where

    def leave(self, now: float) -> None:
        """Record that the request was preempted, and waits again."""
        self._close(now)
        self.place = ""
        self.num_preempted += 1

    def deliver(self, event: Mapping[str, Any], now: float) -> None:
        """Record tokens, or the end, that reached the sink."""
        num_tokens = len(event["token_ids"]) + event["num_tokens_without_ids"]
        if num_tokens and self.first_s is None:
            self._first(event["stamps"], now)
        self.num_tokens += num_tokens
        self.num_prompt_tokens = max(self.num_prompt_tokens, event["num_prompt_tokens"])
        if event["finish_reason"] is not None:
            self._close(now)
            self.ended_s, self.end = now, event["finish_reason"]

    def _first(self, stamps: Mapping[str, float | None], now: float) -> None:
        """Split the time in the engine at the beginning of the computation and at the token."""
        begun_s = self._begun_s
        started_s = stamps["started_s"]
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


def request_paths(log: Iterable[tuple[float, Event, bytes]]) -> Iterator[RequestPath]:
    """The path of each choice, when it has ended. `log`: a DecisionReader. Raises LogError."""
    opened: dict[ChoiceKey, RequestPath] = {}
    for now, event, effects in log:
        if isinstance(event, Arrived):
            for request in event.requests:
                opened[request.key] = _opened(request)
        elif isinstance(event, Preempted) and event.request.key in opened:
            opened[event.request.key].leave(now)
        for effect in shown_effects(effects):
            kind = effect[0]
            if kind == "send":
                _send(opened, effect, now)
            elif kind == "deliver" and "finish_reason" in effect[1]:
                path = opened.get(_key(effect[1]))
                if path is not None and "position" in effect[1]:
                    path.deliver(effect[1], now)
                    if path.end:
                        yield opened.pop(_key(effect[1]))


def _opened(request: Request) -> RequestPath:
    return RequestPath(
        request.request_id, request.choice, request.stamps.arrived_s, request.slo_ttft_s
    )


def _send(opened: Mapping[ChoiceKey, RequestPath], effect: list[Any], now: float) -> None:
    _, node, replica, item = effect
    path = opened.get(_key(item.get("request", item)))
    if path is None or "position" in item:  # tokens stay in the phase of their request
        return
    first = item.get("first")
    is_computed = first is not None and _TRANSFER not in path.place
    path.enter(f"{node}[{replica}]", now, first["stamps"]["started_s"] if is_computed else None)


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
