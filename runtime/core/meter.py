"""Meters of an executor: what operators and edges carried, and how operators spent their time."""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

from sagellm.graphs.ir import Graph

Clock: TypeAlias = Callable[[], float]


@dataclass(slots=True)
class Tally:
    """A count; a transaction adds to it where it is committed."""

    count: int = 0


class Stopwatch:
    """Adds up the time during which something is the case, for one or for several at once."""

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
    """One logic operator. What came and went, its edges count."""

    blocked: Stopwatch  # an input of it is undone, or it holds a queue that nobody takes from
    ended: Tally = field(default_factory=Tally)
    errors: Tally = field(default_factory=Tally)
    process_s: float = 0.0
    num_queued: int = 0
    is_queue: bool = False

    def queue(self, num_queued: int) -> None:
        """The operator told how many wait in it."""
        self.is_queue = True
        if bool(num_queued) != bool(self.num_queued):
            (self.blocked.enter if num_queued else self.blocked.leave)()
        self.num_queued = num_queued


@dataclass(slots=True)
class ServiceMeter:
    """One replica of a service operator: busy while it holds an item, be it in its engine."""

    held: Stopwatch
    blocked: Stopwatch  # a task of it waits for credit downstream
    num_in: int = 0
    num_sent: int = 0
    num_ended: int = 0
    num_errors: int = 0
    process_s: float = 0.0


def standing_still() -> float:
    return 0.0


_ONE_EACH: Mapping[str, int] = {}


class Meter:
    """All meters of one graph. Reading it changes nothing, so any number of readers may.

    `clock` only times the operators; no decision depends on it.
    """

    def __init__(
        self,
        graph: Graph,
        logic: Collection[str],
        replicas: Mapping[str, int] = _ONE_EACH,
        clock: Clock = standing_still,
    ) -> None:
        self.clock = clock
        self.edges = {
            (edge.source, edge.outlet): Tally() for edge in graph.edges if not edge.feedback
        }
        self.logic = {name: LogicMeter(Stopwatch(clock)) for name in logic}
        self.services: dict[tuple[str, int], ServiceMeter] = {}
        for node in graph.nodes:
            for replica in range(replicas.get(node.name, 1)) if node.name not in self.logic else ():
                self.add(node.name, replica)

    def add(self, node: str, replica: int) -> None:
        """One more replica of a service operator."""
        self.services[node, replica] = ServiceMeter(Stopwatch(self.clock), Stopwatch(self.clock))

    def sent(self, source: str, replica: int, number: int = 1) -> None:
        """A service operator, or the source, got rid of items."""
        service = self.services.get((source, replica))
        if service is not None:
            service.num_sent += number

    def entered(self, node: str, replica: int) -> None:
        """A service operator was given an item."""
        service = self.services[node, replica]
        service.num_in += 1
        service.held.enter()

    def queue(self, node: str, num_queued: int) -> None:
        """An operator reported how many wait in it."""
        if node in self.logic:
            self.logic[node].queue(num_queued)

    def waiting(self, source: str, replica: int, undone: Sequence[str]) -> list[Stopwatch]:
        """What times an item of `source` that waits for credit, and the operators undone by it."""
        watches = self.blocked_watches(undone)
        if (source, replica) in self.services:
            watches.append(self.services[source, replica].blocked)
        return watches

    def blocked_watches(self, nodes: Sequence[str]) -> list[Stopwatch]:
        return [self.logic[node].blocked for node in dict.fromkeys(nodes)]
