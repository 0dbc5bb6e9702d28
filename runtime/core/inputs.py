"""The inputs of logic operators: given in order, with all that they lead to."""

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field

from msgspec.structs import replace

from sagellm.runtime.core.books import Books, reason_of
from sagellm.runtime.core.credit import NoCredit
from sagellm.runtime.core.effects import Faulted, Send
from sagellm.runtime.core.faults import OperatorFault
from sagellm.runtime.core.journal import Outcome, Reached, Upstream
from sagellm.runtime.core.meter import Meter
from sagellm.runtime.core.parking import ParkedInput, Parking
from sagellm.runtime.core.region import Region
from sagellm.runtime.core.turn import Turn
from sagellm.runtime.feedback import (
    KINDS,
    Feedback,
    PrefixesChanged,
    QueueChanged,
    RoomChanged,
    Topology,
)
from sagellm.runtime.messages import TokenEvent
from sagellm.runtime.operator import Arrival, Input, Signal, Wake
from sagellm.runtime.plan import Plan
from sagellm.runtime.prefixes import PrefixIndex

_Subscribers = tuple[str, ...]


@dataclass(slots=True)
class _Line:
    """Feedback of one kind of a node: who is given it, and how much each replica gave so far."""

    subscribers: _Subscribers
    numbers: dict[int, int] = field(default_factory=dict)


class Inputs:
    """What an input leads to is over before the next input is given, feedback included. An input
    that finds no credit is parked.
    """

    def __init__(
        self, plan: Plan, turn: Turn, region: Region, meter: Meter, books: Books, parking: Parking
    ) -> None:
        self._plan = plan
        self._turn = turn
        self._region = region
        self._meter = meter
        self._books = books
        self._parking = parking
        self._inputs: deque[tuple[str, Input]] = deque()
        self._lines: dict[tuple[str, type], _Line] = {}
        names, spec = tuple(region.cells), plan.spec
        self._taking: dict[str, _Subscribers] = {
            kind: tuple(name for name in names if kind in spec(name).signals)
            for kind in ("cancel", "expire", "forget")
        }
        self._forgetting = [
            (name, getattr(plan.logic[name], "keeps", None)) for name in self._taking["forget"]
        ]
        self._placing = tuple(name for name in names if "topology" in plan.subscribes(name))
        self._cache_readers = {engine: plan.cache_readers(engine) for engine in plan.engines}

    def feed(self, node: str, happened: Input) -> None:
        """Give an operator an input. Its faults are logged, and end what nothing else would end."""
        self._inputs.append((node, happened))
        self.settle()

    def signal(self, signal: Signal) -> None:
        """Give a signal to every operator that takes its kind."""
        self._inputs += ((name, signal) for name in self._taking[signal.kind])
        self.settle()

    def report(self, feedback: Feedback) -> None:
        """Give feedback to those that subscribe to it."""
        self._spread(feedback, feedback.node)
        self.settle()

    def tell_room(self, changes: Iterable[RoomChanged]) -> None:
        """Give each change to the operator that it concerns."""
        self._inputs += ((changed.node, changed) for changed in changes)
        self.settle()

    def change(self, topology: Topology) -> None:
        """Give a new topology to those that place requests."""
        self._inputs += ((name, topology) for name in self._placing)
        self.settle()

    def change_prefixes(self, engine: str, index: PrefixIndex) -> None:
        """Give the index of an engine to those that ask for it."""
        changed = PrefixesChanged(engine, index)
        self._inputs += ((name, changed) for name in self._cache_readers[engine])

    def settle(self) -> None:
        """Give all inputs that wait; each may lead to more."""
        books, inputs = self._books, self._inputs
        while inputs or books.forgotten:
            if books.forgotten:
                for request_id in books.take_forgotten():
                    self._forget(request_id)
                continue
            node, happened = inputs.popleft()
            refused = self.give(node, happened)
            if refused is not None:
                way = refused.node, refused.replica
                watches = self._meter.blocked_watches(self._region.undone)
                self._parking.add(ParkedInput(node, happened, way, watches))

    def _forget(self, request_id: str) -> None:
        """Tell the operators that keep anything of a request that it has ended."""
        self._region.forget(request_id)
        forget = Signal("forget", request_id)
        for name, keeps in self._forgetting:
            if keeps is None or keeps(self._region.cells[name].state, request_id):
                self._inputs.append((name, forget))

    def give(self, node: str, happened: Input) -> NoCredit | None:
        """Give an operator one input; NoCredit, and nothing has changed, where it must wait."""
        try:
            outcomes = self._region.feed(node, happened, self._turn.now)
        except NoCredit as refused:
            return refused
        except Exception as error:
            fault = error if isinstance(error, OperatorFault) else OperatorFault(node, error)
            self._end_by_fault(node, happened, fault)
            return None
        if outcomes:
            self.apply(outcomes)
        if type(happened) is Wake and (lost := self._region.lost(node)) is not None:
            self._end_by_fault(node, happened, OperatorFault(node, lost))
        return None

    def apply(self, outcomes: list[Outcome]) -> None:
        """Do what a transaction led to; feedback waits for `settle`."""
        books, effects = self._books, self._turn.effects
        for outcome in outcomes:
            if type(outcome) is Reached:
                if outcome.fault is None:
                    books.to_sink(outcome.item, terminal=outcome.terminal)
                else:
                    assert isinstance(outcome.item, TokenEvent)
                    books.end(outcome.item, outcome.fault)
            elif type(outcome) is Send:
                self._meter.entered(outcome.node, outcome.replica)
                effects.append(outcome)
            else:
                assert isinstance(outcome, Upstream)
                self._spread(outcome.feedback, outcome.node)

    def is_to_wake(self, node: str) -> bool:
        """Whether a wake-up of an operator is to come, or waits for credit."""
        waits = any(
            isinstance(parked, ParkedInput)
            and parked.node == node
            and isinstance(parked.happened, Wake)
            for parked in self._parking.all
        )
        return waits or self._region.cells[node].wake_at is not None

    def _spread(self, feedback: Feedback, node: str) -> None:
        """Number feedback of a node, and make it an input of all that subscribe to it."""
        kind = type(feedback)
        if isinstance(feedback, QueueChanged):
            self._meter.queue(node, feedback.backlog.num_requests)
        line = self._lines.get((node, kind))
        if line is None:
            line = self._lines[node, kind] = _Line(self._plan.subscribers(node, KINDS[kind]))
        if line.subscribers:
            replica, numbers = feedback.replica, line.numbers
            numbers[replica] = number = numbers.get(replica, 0) + 1
            numbered = replace(feedback, node=node, sequence=number)
            for name in line.subscribers:
                self._inputs.append((name, numbered))

    def _end_by_fault(self, node: str, happened: Input, fault: OperatorFault) -> None:
        """A signal and an item concern one request. Other inputs may be what all that the operator
        holds waited for: unless a wake-up is to come, all of it ends.
        """
        self._turn.effects.append(Faulted(fault, getattr(happened, "request_id", "")))
        held = self._region.holdings.of(node)
        match happened:
            case Arrival(item):
                self._books.fail(fault, item, is_logged=True)
            case Signal() as signal:
                for item in held:
                    if signal.concerns(item.key):
                        self._books.finish(item, reason_of(signal))
            case _ if not self.is_to_wake(node):
                self._region.restart(node)
                for item in held:
                    self._books.fail(fault, item, is_logged=True)
