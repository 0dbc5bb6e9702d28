"""The queue of inputs of logic operators: gives each input, and applies its outcomes."""

from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from msgspec.structs import replace

from sagellm.runtime.core.accounting import Meter
from sagellm.runtime.core.credit import Gates, NoCredit
from sagellm.runtime.core.effects import Faulted, OperatorFault, Reaction, ScaleTo, Send
from sagellm.runtime.core.journal import ReachedSink, TransactionOutcome, UpstreamFeedback
from sagellm.runtime.core.logic_graph import LogicGraph
from sagellm.runtime.core.parking import BlockedAt, ParkedInput, Parking, entrances
from sagellm.runtime.core.request_lifecycle import RequestLifecycle, reason_of
from sagellm.runtime.feedback import (
    KINDS,
    Feedback,
    HealthChanged,
    PrefixesChanged,
    QueueChanged,
    RoleAssigned,
    RoomChanged,
    ScaleEnded,
    Topology,
)
from sagellm.runtime.messages import TokenEvent
from sagellm.runtime.operator import Arrival, Input, Signal, Wake
from sagellm.runtime.plan import Plan
from sagellm.runtime.prefixes import PrefixIndex
from sagellm.runtime.shadow import Shadowed


class RoomReports:
    """Finds the changes to report as feedback "room": whether downstream operators have credit."""

    def __init__(self, plan: Plan, gates: Gates) -> None:
        self._gates = gates
        self._entrances = {
            name: frozenset(entrances(plan.graph, plan.logic, name))
            for name in plan.logic
            if "room" in plan.spec(name).subscribes
        }
        self._full: set[str] = set()  # subscribers whose latest report has `has_room` False
        self._full_services: set[str] = set()  # `Gates.full` at the last call of `changes`

    @property
    def may_have_changed(self) -> bool:
        """Whether other service operators are full now than at the last call of `changes`."""
        return self._gates.full != self._full_services

    def changes(self) -> list[RoomChanged]:
        """The reports that differ from the latest report to the same subscriber."""
        self._full_services = set(self._gates.full)
        found = []
        for node, names in self._entrances.items():
            is_full = all(map(self._has_no_room, names))
            if is_full != (node in self._full):
                (self._full.add if is_full else self._full.remove)(node)
                found.append(RoomChanged(node=node, has_room=not is_full))
        return found

    def _has_no_room(self, node: str) -> bool:
        """Whether an operator has no room, or its decode operator (`Plan.decoders`) has none."""
        gates = self._gates
        return node in gates.full or gates.reserved.later.get(node) in gates.full


_Subscribers = tuple[str, ...]


@dataclass(slots=True)
class _Subscription:
    """The subscribers to one kind of feedback from a node.

    `numbers`: the number of reports so far, by replica.
    """

    subscribers: _Subscribers
    numbers: dict[int, int] = field(default_factory=dict)


class InputQueue:
    """Gives inputs to logic operators one at a time, in order.

    The outcomes of an input are applied before the next input is given; feedback among them is
    queued as further inputs. An input that leads to an item without credit is parked.
    """

    def __init__(
        self,
        plan: Plan,
        reaction: Reaction,
        logic_graph: LogicGraph,
        meter: Meter,
        lifecycle: RequestLifecycle,
        parking: Parking,
    ) -> None:
        self._plan = plan
        self._reaction = reaction
        self._logic_graph = logic_graph
        self._meter = meter
        self._lifecycle = lifecycle
        self._parking = parking
        self.assign: Callable[[RoleAssigned], HealthChanged]  # set by the set of replicas
        self._inputs: deque[tuple[str, Input]] = deque()
        self._subscriptions: dict[tuple[str, type], _Subscription] = {}
        names, spec = tuple(logic_graph.cells), plan.spec
        self._signal_takers: dict[str, _Subscribers] = {
            kind: tuple(name for name in names if kind in spec(name).signals)
            for kind in ("cancel", "expire", "forget")
        }
        self._forget_takers = [
            (name, getattr(plan.logic[name], "keeps", None))
            for name in self._signal_takers["forget"]
        ]
        self._topology_takers = tuple(name for name in names if "topology" in plan.subscribes(name))
        self._cache_readers = {engine: plan.cache_readers(engine) for engine in plan.engines}
        self._read_by_shadows = frozenset(filter(plan.only_shadows_read, plan.engines))

    def feed(self, node: str, happened: Input) -> None:
        """Give an operator an input. If the operator fails, its requests that depend on it end."""
        self._inputs.append((node, happened))
        self.settle()

    def signal(self, signal: Signal) -> None:
        """Give a signal to every operator that takes its kind."""
        self._inputs += ((name, signal) for name in self._signal_takers[signal.kind])
        self.settle()

    def report(self, feedback: Feedback) -> None:
        """Give feedback to its subscribers."""
        self._publish(feedback, feedback.node)
        self.settle()

    def report_room(self, changes: Iterable[RoomChanged]) -> None:
        """Give each report of room to its subscriber."""
        self._inputs += ((changed.node, changed) for changed in changes)
        self.settle()

    def change(self, topology: Topology) -> None:
        """Give a new topology to its subscribers."""
        self._inputs += ((name, topology) for name in self._topology_takers)
        self.settle()

    def report_prefixes(self, engine: str, index: PrefixIndex) -> None:
        """Queue the new index of an engine for the operators that read it."""
        readers, are_shadows = self._cache_readers[engine], engine in self._read_by_shadows
        if are_shadows:  # live operators decide as without shadows
            readers = tuple(one for one in readers if isinstance(self._plan.logic[one], Shadowed))
        changed = PrefixesChanged(engine, index, are_shadows)
        self._inputs += ((name, changed) for name in readers)

    def settle(self) -> None:
        """Give all queued inputs, until none is left: an input may queue further inputs."""
        lifecycle, inputs = self._lifecycle, self._inputs
        while inputs or lifecycle.to_forget:
            if lifecycle.to_forget:
                for request_id in lifecycle.take_to_forget():
                    self._forget(request_id)
                continue
            node, happened = inputs.popleft()
            refused = self.give(node, happened)
            if refused is not None:
                gate = BlockedAt(refused.node, refused.replica)
                watches = self._meter.blocked_watches(self._logic_graph.undone)
                self._parking.add(ParkedInput(node, happened, gate, watches))

    def _forget(self, request_id: str) -> None:
        """Queue the signal "forget" of an ended request for the operators that know the request."""
        self._logic_graph.forget(request_id)
        forget = Signal("forget", request_id)
        for name, keeps in self._forget_takers:
            # An operator without `keeps` gets the signal for every request.
            if keeps is None or keeps(self._logic_graph.cells[name].state, request_id):
                self._inputs.append((name, forget))

    def give(self, node: str, happened: Input) -> NoCredit | None:
        """Give an operator one input, and apply the outcomes.

        Returns NoCredit if the input leads to an item without credit; then nothing has changed.
        """
        try:
            outcomes = self._logic_graph.feed(node, happened, self._reaction.now)
        except NoCredit as refused:
            return refused
        except Exception as error:
            fault = error if isinstance(error, OperatorFault) else OperatorFault(node, error)
            self._end_by_fault(node, happened, fault)
            return None
        if outcomes:
            self.apply(outcomes)
        # Items in a state that the operator has dropped would never be sent: end their requests.
        if type(happened) is Wake and (lost := self._logic_graph.lost(node)) is not None:
            self._end_by_fault(node, happened, OperatorFault(node, lost))
        return None

    def apply(self, outcomes: list[TransactionOutcome]) -> None:
        """Apply the outcomes of a transaction; feedback is queued for `settle`."""
        lifecycle, effects = self._lifecycle, self._reaction.effects
        for outcome in outcomes:
            if type(outcome) is ReachedSink:
                if outcome.fault is None:
                    lifecycle.deliver(outcome.item, terminal=outcome.terminal)
                else:
                    assert isinstance(outcome.item, TokenEvent)
                    lifecycle.end(outcome.item, outcome.fault)
            elif type(outcome) is Send:
                self._meter.entered(outcome.node, outcome.replica)
                effects.append(outcome)
            elif type(outcome) is ScaleTo:
                self._meter.scaling(outcome.engine).begin(outcome.num_replicas, outcome.reason)
                effects.append(outcome)
            else:
                assert isinstance(outcome, UpstreamFeedback)
                if isinstance(outcome.feedback, RoleAssigned):
                    health = self.assign(outcome.feedback)
                    self._publish(health, health.node)
                else:
                    self._publish(outcome.feedback, outcome.node)

    def is_to_wake(self, node: str) -> bool:
        """Whether an operator has asked for a wake-up, or a wake-up of it is parked."""
        waits = any(
            isinstance(parked, ParkedInput)
            and parked.node == node
            and isinstance(parked.happened, Wake)
            for parked in self._parking.all
        )
        return waits or self._logic_graph.cells[node].wake_at is not None

    def _publish(self, feedback: Feedback, node: str) -> None:
        """Number a report of a node, and queue it for all subscribers."""
        kind = type(feedback)
        if isinstance(feedback, QueueChanged):
            self._meter.queue(node, feedback.backlog.num_requests)
        elif isinstance(feedback, ScaleEnded):
            self._meter.scaling(feedback.engine).num_failed += bool(feedback.error)
        subscription = self._subscriptions.get((node, kind))
        if subscription is None:
            subscription = self._subscriptions[node, kind] = _Subscription(
                self._plan.subscribers(node, KINDS[kind])
            )
        if subscription.subscribers:
            replica, numbers = feedback.replica, subscription.numbers
            numbers[replica] = number = numbers.get(replica, 0) + 1
            numbered = replace(feedback, node=node, sequence=number)
            for name in subscription.subscribers:
                self._inputs.append((name, numbered))

    def _end_by_fault(self, node: str, happened: Input, fault: OperatorFault) -> None:
        """Log the fault of an operator, and end the requests that depend on the failed input.

        If the input is an item or a signal, only its own request ends. Otherwise the operator may
        have needed the input to send any of its held requests: all of them end, unless the operator
        will be woken and can try again.
        """
        self._reaction.effects.append(Faulted(fault, getattr(happened, "request_id", "")))
        held = self._logic_graph.held_items.of(node)
        match happened:
            case Arrival(item):
                self._lifecycle.fail(fault, item, is_logged=True)
            case Signal() as signal:
                for item in held:
                    if signal.concerns(item.key):
                        self._lifecycle.finish(item, reason_of(signal))
            case _ if not self.is_to_wake(node):
                self._logic_graph.restart(node)
                for item in held:
                    self._lifecycle.fail(fault, item, is_logged=True)
