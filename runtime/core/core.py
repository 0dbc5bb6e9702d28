"""The core: makes all decisions of a running graph, through `on(event, now) -> effects`."""

import math
from collections.abc import Callable
from typing import Any

from sagellm.graphs.ir import SOURCE
from sagellm.runtime.core.accounting import Clock, Meter, stopped_clock
from sagellm.runtime.core.availability import ReplicaSet
from sagellm.runtime.core.credit import CreditGate, Gates
from sagellm.runtime.core.effects import Effect, OperatorFault, Reaction, WakeAt
from sagellm.runtime.core.events import (
    Arrived,
    CacheReported,
    Emitted,
    Ended,
    EngineFailed,
    Event,
    Failed,
    Finished,
    Opened,
    Released,
    ReplicaAdded,
    ReplicaMarked,
    ReplicaRemoved,
    Reported,
    Returned,
    Signalled,
    Stopped,
    TimeCame,
    Transferred,
    Withdrawn,
)
from sagellm.runtime.core.experiments import Experiments
from sagellm.runtime.core.flow import Flow, Reentry
from sagellm.runtime.core.inputs import InputQueue, RoomReports
from sagellm.runtime.core.logic_graph import LogicGraph
from sagellm.runtime.core.parking import Parking
from sagellm.runtime.core.prefix_indexes import PrefixIndexes
from sagellm.runtime.core.request_lifecycle import (
    Register,
    RequestLifecycle,
    quarantined_event,
    unavailable_event,
)
from sagellm.runtime.feedback import CreditChanged
from sagellm.runtime.messages import EngineReplica
from sagellm.runtime.operator import Signal, Wake
from sagellm.runtime.plan import Plan

# Events that may change when a hold or an ejection ends.
_MAY_MOVE_WAKE = frozenset(
    {ReplicaMarked, ReplicaAdded, ReplicaRemoved, Transferred, EngineFailed, TimeCame}
)


class Core:
    """Runs the logic operators of a plan, and keeps its credit, requests, recovery and replicas.

    The core does no I/O, never waits, and reads neither a clock nor a random source: equal events
    at equal times have equal effects, so that a log of events can be replayed. `max_hold_s`: how
    long a request waits while its engine has no replica, in seconds. `clock` only measures the run
    time of operators; no decision depends on it.
    """

    def __init__(
        self, plan: Plan, *, max_hold_s: float = math.inf, clock: Clock = stopped_clock
    ) -> None:
        self._reaction = reaction = Reaction()
        self.gates = Gates(plan.decoders)
        register = Register()
        num_replicas = {node.name: plan.num_replicas(node.name) for node in plan.graph.nodes}
        self.meter = Meter(plan.graph, plan.logic, num_replicas, clock)
        self.logic_graph = LogicGraph(
            plan.graph,
            plan.logic,
            self.gates,
            num_replicas,
            seed=plan.seed,
            meter=self.meter,
            entries=register.entries,
        )
        self.register = register
        drops_tokens = any(plan.spec(node.name).drops_tokens for node in plan.graph.nodes)
        self.lifecycle = RequestLifecycle(
            reaction, self.gates, self.logic_graph.held_items, register, drops_tokens=drops_tokens
        )
        self.ledger, self.recovery = self.lifecycle.ledger, self.lifecycle.recovery
        parking = Parking()
        self._inputs = InputQueue(
            plan, reaction, self.logic_graph, self.meter, self.lifecycle, parking
        )
        self._flow = Flow(
            reaction, self.logic_graph, self.meter, self.lifecycle, parking, self._inputs
        )
        self._reentry = Reentry(plan, reaction, self.lifecycle, self._inputs, self._flow)
        self.prefixes = PrefixIndexes(plan, reaction, self._inputs.report_prefixes)
        self.replicas = ReplicaSet(
            plan,
            reaction,
            self.gates,
            self.meter,
            self._inputs,
            self.prefixes,
            num_replicas,
            max_hold_s,
        )
        self.outliers = self.replicas.outliers
        self._room_reports = RoomReports(plan, self.gates)
        self.experiments = Experiments.of(self.logic_graph, plan.specs, register.entries)
        self._wake_at_s = math.inf
        self._handlers = _event_handlers(self)

    def on(self, event: Event, now: float) -> list[Effect]:
        """Process an event, and return its effects in order. `now` must never decrease."""
        reaction = self._reaction
        reaction.now, reaction.effects = now, []
        self._handlers[type(event)](event)
        self.prefixes.settle()
        self._inputs.settle()
        if self.replicas.has_opened:
            self.replicas.has_opened = False
            self._flow.retry_all()
        if self.recovery.is_under_way:
            self._reentry.try_next()
        # Last, because changes within one event may cancel each other out.
        if self._room_reports.may_have_changed:
            self._inputs.report_room(self._room_reports.changes())
        may_have_moved = self.logic_graph.wakes_changed or self.register.expiries_changed
        if may_have_moved or type(event) in _MAY_MOVE_WAKE:
            self._request_wake()
        if self.experiments is not None:
            self.experiments.settle(reaction)
        return reaction.effects

    @property
    def plan(self) -> Plan:
        """The current plan; it is replaced when replicas are added or removed."""
        return self.replicas.plan

    @property
    def is_at_rest(self) -> bool:
        """Whether no request is open, and no engine still computes a request that has ended."""
        return self.register.is_empty

    def _request_wake(self) -> None:
        """Ask the executor for a wake-up at the earliest due time, if that time has changed."""
        at_s = min(
            self.logic_graph.next_wake_s, self.register.next_expiry_s, self.replicas.next_time_s
        )
        if at_s != self._wake_at_s:
            self._wake_at_s = at_s
            self._reaction.effects.append(WakeAt(at_s))

    def _arrive(self, arrived: Arrived) -> None:
        self.lifecycle.open(arrived.requests)
        self._inputs.settle()  # first, let operators forget an earlier request with the same id
        # Before any operator sees the request: a quarantined one must not reach an engine.
        for request in arrived.requests:
            if self.recovery.is_blocked(request):
                self.lifecycle.end(quarantined_event(request, self._reaction.now), None)
            elif self.replicas.availability.is_cut:
                self.lifecycle.end(unavailable_event(request, self._reaction.now), None)
        fit = tuple(one for one in arrived.requests if self.register.is_open(one.key))
        if fit:
            self._flow.emit(arrived.ticket, SOURCE, 0, fit)

    def _end(self, ended: Ended) -> None:
        fault = None if ended.error is None else OperatorFault(ended.node, ended.error)
        self.lifecycle.end(ended.event, fault)

    def _signal(self, signal: Signal) -> None:
        """Pass a signal to everything that keeps its request; ignore unknown requests."""
        if signal.request_id not in self.register.entries:
            return
        # First, because items of the request that are sent later must find the tombstone.
        self.register.record_signal(signal)
        self._reentry.end_waiting(signal)
        self._inputs.signal(signal)
        self.lifecycle.interrupt(signal)
        self._flow.retry_request(signal.request_id)

    def _release(self, released: Released) -> None:
        """Return the credit of an item, and retry parked entries that wait for credit there."""
        gate = CreditGate(released.node, released.replica)
        key = released.request_id, released.choice
        if not self.gates.give(gate, key):
            return
        self.meter.services[gate].held.leave()
        unused = self.gates.reserved.gate_of(key)
        # With no other credit left, the choice will never reach the operator of its reservation.
        if unused is not None and len(self.gates.holders(*key)) == 1:
            self.gates.give(unused, key)
        node, replica = gate
        num_left = self.gates.accounts[gate].requests
        self._inputs.report(
            CreditChanged(node=node, replica=replica, num_left=num_left, request_id=key[0])
        )
        self.lifecycle.note_released(key)
        self._flow.retry(node, replica)
        if unused is not None:
            self._flow.retry(*unused)

    def _emit(self, emitted: Emitted) -> None:
        node, replica, items = emitted.node, emitted.replica, emitted.items
        # Tokens clear a suspect; nearly always there is none, and the items are not looked at.
        if self.outliers.suspects and any(getattr(item, "num_tokens", 0) for item in items):
            self.outliers.computed(EngineReplica(self.plan.engine_name(node) or "", replica))
        self._flow.emit(emitted.ticket, node, replica, items, emitted.outlet)

    def _fail_over(self, failed: EngineFailed) -> None:
        engine = self.plan.engine_name(failed.node) or ""
        self.outliers.computed_wrong(EngineReplica(engine, failed.replica))
        self._reentry.fail_over(failed, engine, self.replicas.availability.num_present(engine))

    def _transfer(self, transferred: Transferred) -> None:
        note = self.outliers.passed if transferred.succeeded else self.outliers.failed
        note(transferred.sender, transferred.receiver)

    def _mark(self, marked: ReplicaMarked) -> None:
        self.replicas.mark(marked.engine, marked.replica, is_up=marked.is_up)
        self._flow.retry_all()

    def _remove(self, removed: ReplicaRemoved) -> None:
        """Remove a lost replica for good. Requests that were placed on it are placed again."""
        self.replicas.remove(removed.engine, removed.replica)
        self._flow.retry_all()

    def _wake(self) -> None:
        """Expire requests, wake operators, and end the holds and ejections that are due."""
        now = self._reaction.now
        for request_id in self.register.take_expired(now):
            self._signal(Signal("expire", request_id))
        for node in self.logic_graph.take_due(now):
            self._inputs.feed(node, Wake())
        for gate, request_ids in self.logic_graph.holds.take_due(now).items():
            self._flow.end_holds(*gate, request_ids, num_left=self.gates.accounts[gate].requests)
        availability = self.replicas.availability
        if availability.take_due(now):
            self._reentry.end_unserved(availability.max_hold_s)
            self._flow.retry_all()
        self.outliers.readmit_due()
        self._wake_at_s = math.nan  # unequal to any time, so that the next wake-up is requested


def _event_handlers(core: Core) -> dict[type, Callable[[Any], None]]:
    """The method that handles each type of event."""
    return {
        Opened: core.replicas.open,
        Arrived: core._arrive,
        Emitted: core._emit,
        Withdrawn: lambda e: core._flow.withdraw(e.ticket),
        Released: core._release,
        Ended: core._end,
        Failed: lambda e: core.lifecycle.fail(OperatorFault(e.node, e.error), e.item),
        Finished: lambda e: core.lifecycle.finish(e.item, e.reason),
        Returned: core._reentry.enter_again,
        EngineFailed: core._fail_over,
        Transferred: core._transfer,
        Reported: lambda e: core._inputs.report(e.feedback),
        CacheReported: lambda e: core.prefixes.report(e.changed),
        Signalled: lambda e: core._signal(e.signal),
        ReplicaAdded: lambda e: core.replicas.add(e.engine),
        ReplicaMarked: core._mark,
        ReplicaRemoved: core._remove,
        TimeCame: lambda e: core._wake(),
        Stopped: lambda e: core.lifecycle.fail_open(),
    }
