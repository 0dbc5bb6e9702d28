"""The ledger, which checks that nothing is lost, and the meters of operators and edges."""

from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

from sagellm.graphs.ir import Graph
from sagellm.runtime.messages import Answer, ChoiceKey, Forked, Item, TokenEvent


class LedgerError(AssertionError):
    """A request or a token was lost or doubled: a fault of sagellm, never of its user."""


@dataclass(slots=True)
class Ledger:
    """Checks that every accepted choice ends once, and that its tokens come in order without gaps.

    Faults are collected; `check` raises LedgerError if there are any.
    """

    gaps: bool = False  # whether gaps are allowed: a user's filter or map may drop tokens
    num_accepted: int = 0
    ended: Counter[str] = field(default_factory=Counter)
    num_tokens: int = 0
    _next_position: dict[ChoiceKey, int] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)

    @property
    def num_open(self) -> int:
        return len(self._next_position)

    def accept(self, key: ChoiceKey, *, position: int = 0) -> None:
        """Record that a choice enters. `position`: the position of its first new token."""
        self.num_accepted += 1
        if key in self._next_position:
            self.faults.append(f"{key} was accepted twice")
        self._next_position[key] = position

    def fork(self, forked: Forked) -> None:
        """Record that a request became several choices."""
        for choice in range(forked.num_choices):
            if (forked.request_id, choice) not in self._next_position:
                self.accept((forked.request_id, choice))

    def record(self, item: Item) -> None:
        """Record that an item reached the sink."""
        if isinstance(item, TokenEvent):
            self.record_tokens(item)
        elif item.key not in self._next_position:
            self._miss(item)
        elif isinstance(item, Answer):
            self.num_tokens += item.num_tokens
            self._end(item.key, item.finish_reason)

    def record_tokens(self, event: TokenEvent) -> None:
        """Record that tokens, or the end of a choice, reached the sink."""
        key, position = event.key, event.position
        num_tokens = len(event.token_ids) + event.num_tokens_without_ids
        expected = self._next_position.get(key)
        if expected is None:
            self._miss(event)
            return
        if position != expected and num_tokens and (position < expected or not self.gaps):
            self.faults.append(f"{key} gave position {position}, not {expected}")
        self._next_position[key] = position + num_tokens
        self.num_tokens += num_tokens
        if event.finish_reason is not None:
            self._end(key, event.finish_reason)

    def _miss(self, item: Item) -> None:
        self.faults.append(f"{item.key} had no request, or had ended")

    def _end(self, key: ChoiceKey, reason: str) -> None:
        del self._next_position[key]
        self.ended[reason] += 1

    def check(self) -> None:
        """Raise LedgerError for any fault so far, and for any choice that is still open.

        To be called when the graph is idle.
        """
        if self._next_position:
            self.faults.append(f"never ended: {sorted(self._next_position)[:8]}")
        if self.num_accepted != self.ended.total():
            self.faults.append(f"{self.num_accepted} accepted, {self.ended.total()} ended")
        if self.faults:
            raise LedgerError("; ".join(self.faults))


Clock: TypeAlias = Callable[[], float]


@dataclass(slots=True)
class CommittedCount:
    """A count of items that changes only when a transaction is committed."""

    count: int = 0


class Stopwatch:
    """Measures the total time during which at least one of its intervals is open."""

    __slots__ = ("_clock", "_since_s", "_total_s", "level")

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._since_s = 0.0
        self._total_s = 0.0
        self.level = 0

    def enter(self) -> None:
        if self.level == 0:
            self._since_s = self._clock()
        self.level += 1

    def leave(self) -> None:
        self.level -= 1
        if self.level == 0:
            self._total_s += self._clock() - self._since_s

    @property
    def seconds(self) -> float:
        return self._total_s + (self._clock() - self._since_s if self.level else 0.0)


@dataclass(slots=True)
class LogicMeter:
    """The meter of a logic operator. Its items are counted by the meters of its edges.

    `is_queue`: whether the operator has reported a backlog.
    """

    blocked: Stopwatch  # runs while an undone input or a queued item waits for credit
    ended: CommittedCount = field(default_factory=CommittedCount)
    errors: CommittedCount = field(default_factory=CommittedCount)
    process_s: float = 0.0
    num_queued: int = 0
    is_queue: bool = False

    def queue(self, num_queued: int) -> None:
        """Record how many items wait in the operator."""
        self.is_queue = True
        if bool(num_queued) != bool(self.num_queued):
            (self.blocked.enter if num_queued else self.blocked.leave)()
        self.num_queued = num_queued


@dataclass(slots=True)
class ServiceMeter:
    """The meter of one replica of a service operator."""

    held: Stopwatch  # runs while the replica holds any item
    blocked: Stopwatch  # runs while any task of the replica waits for credit downstream
    num_in: int = 0
    num_sent: int = 0
    num_ended: int = 0
    num_errors: int = 0
    process_s: float = 0.0


def stopped_clock() -> float:
    return 0.0


@dataclass(slots=True)
class ScalingMeter:
    """The meter of the changes that operators make to the number of replicas of one engine.

    `num_wanted`: the number of replicas after the latest change. `changes`: by reason.
    """

    num_wanted: int = 0
    changes: Counter[str] = field(default_factory=Counter)
    num_failed: int = 0

    def begin(self, num_replicas: int, reason: str) -> None:
        """Record that a change begins."""
        self.num_wanted = num_replicas
        self.changes[reason] += 1


_ONE_EACH: Mapping[str, int] = {}


class Meter:
    """All meters of one graph. Reading the meters does not change them.

    `replicas`: the number of replicas of each service operator, 1 by default. `clock` only measures
    time; no decision depends on it.
    """

    def __init__(
        self,
        graph: Graph,
        logic: Collection[str],
        replicas: Mapping[str, int] = _ONE_EACH,
        clock: Clock = stopped_clock,
    ) -> None:
        self.clock = clock
        self.edges = {
            (edge.source, edge.outlet): CommittedCount()
            for edge in graph.edges
            if not edge.feedback
        }
        self.logic = {name: LogicMeter(Stopwatch(clock)) for name in logic}
        self.services: dict[tuple[str, int], ServiceMeter] = {}
        self.scalings: dict[str, ScalingMeter] = {}  # by engine
        for node in graph.nodes:
            for replica in range(replicas.get(node.name, 1)) if node.name not in self.logic else ():
                self.add(node.name, replica)

    def add(self, node: str, replica: int) -> None:
        """Add a replica of a service operator."""
        self.services[node, replica] = ServiceMeter(Stopwatch(self.clock), Stopwatch(self.clock))

    def scaling(self, engine: str) -> ScalingMeter:
        """The meter of the changes of the number of replicas of an engine."""
        return self.scalings.setdefault(engine, ScalingMeter())

    def sent(self, source: str, replica: int, number: int = 1) -> None:
        """Count items that a service operator has sent; items from the source are ignored."""
        service = self.services.get((source, replica))
        if service is not None:
            service.num_sent += number

    def entered(self, node: str, replica: int) -> None:
        """Count an item that was given to a service operator."""
        service = self.services[node, replica]
        service.num_in += 1
        service.held.enter()

    def queue(self, node: str, num_queued: int) -> None:
        """Record how many items wait in an operator."""
        if node in self.logic:
            self.logic[node].queue(num_queued)

    def waiting(self, source: str, replica: int, undone: Sequence[str]) -> list[Stopwatch]:
        """The stopwatches to run while an item of `source` waits for credit.

        `undone`: the logic operators of the undone transaction.
        """
        watches = self.blocked_watches(undone)
        if (source, replica) in self.services:
            watches.append(self.services[source, replica].blocked)
        return watches

    def blocked_watches(self, nodes: Sequence[str]) -> list[Stopwatch]:
        """The stopwatches to run while an input of these logic operators waits for credit."""
        return [self.logic[node].blocked for node in dict.fromkeys(nodes)]
