"""The core: all that decides without waiting, behind one entrance, `on(event, now) -> effects`."""

import math
from collections.abc import Callable
from typing import Any

from sagellm.graphs.ir import SOURCE
from sagellm.runtime.core.books import Books, quarantined, unavailable
from sagellm.runtime.core.credit import Gates
from sagellm.runtime.core.effects import Effect, WakeAt
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
from sagellm.runtime.core.faults import OperatorFault
from sagellm.runtime.core.flow import Flow
from sagellm.runtime.core.inputs import Inputs
from sagellm.runtime.core.meter import Clock, Meter, standing_still
from sagellm.runtime.core.parking import Parking
from sagellm.runtime.core.prefixes import Prefixes
from sagellm.runtime.core.region import Region
from sagellm.runtime.core.register import Register
from sagellm.runtime.core.replicas import Replicas
from sagellm.runtime.core.returns import Returns
from sagellm.runtime.core.room import Room
from sagellm.runtime.core.turn import Turn
from sagellm.runtime.feedback import CreditChanged
from sagellm.runtime.operator import Signal, Wake
from sagellm.runtime.plan import Plan

_MOVES_TIME = frozenset(
    {ReplicaMarked, ReplicaAdded, ReplicaRemoved, Transferred, EngineFailed, TimeCame}
)


class Core:
    """The logic operators of a plan, the credits, the register of open requests, recovery, the
    replicas' health and the ledger. It waits for nothing, and knows no clock and no random source:
    equal events at equal times have equal effects.

    `max_hold_s`: how long requests wait for an engine of which no replica is there. `clock` only
    times the operators; no decision depends on it.
    """

    def __init__(
        self, plan: Plan, *, max_hold_s: float = math.inf, clock: Clock = standing_still
    ) -> None:
        self._turn = turn = Turn()
        self.gates = Gates(plan.decoders)
        register = Register()
        num_replicas = {node.name: plan.num_replicas(node.name) for node in plan.graph.nodes}
        self.meter = Meter(plan.graph, plan.logic, num_replicas, clock)
        self.region = Region(
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
        self.books = Books(
            turn, self.gates, self.region.holdings, register, drops_tokens=drops_tokens
        )
        self.ledger, self.recovery = self.books.ledger, self.books.recovery
        parking = Parking()
        self._inputs = Inputs(plan, turn, self.region, self.meter, self.books, parking)
        self._flow = Flow(turn, self.region, self.meter, self.books, parking, self._inputs)
        self._returns = Returns(plan, turn, self.books, self._inputs, self._flow)
        self.prefixes = Prefixes(plan, turn, self._inputs.change_prefixes)
        self.replicas = Replicas(
            plan,
            turn,
            self.gates,
            self.meter,
            self._inputs,
            self.prefixes,
            num_replicas,
            max_hold_s,
        )
        self.outliers = self.replicas.outliers
        self._room = Room(plan, self.gates)
        self._told_s = math.inf
        self._reactions = _reactions_of(self)

    def on(self, event: Event, now: float) -> list[Effect]:
        """What an event leads to, in order. `now` never falls."""
        turn = self._turn
        turn.now, turn.effects = now, []
        self._reactions[type(event)](event)
        self.prefixes.settle()
        self._inputs.settle()
        if self.recovery.is_under_way:
            self._returns.try_next()
        if self._room.may_have_changed:
            self._inputs.tell_room(self._room.changes())
        has_moved = self.region.wakes_changed or self.register.expiries_changed
        if has_moved or type(event) in _MOVES_TIME:
            self._tell_time()
        return turn.effects

    @property
    def plan(self) -> Plan:
        """The plan as it is by now."""
        return self.replicas.plan

    @property
    def is_at_rest(self) -> bool:
        """Whether no request is open, and no engine works for one that has ended."""
        return self.register.is_empty

    def _tell_time(self) -> None:
        """Ask for a wake-up at another time than before, if that has changed."""
        at_s = min(self.region.next_wake_s, self.register.next_expiry_s, self.replicas.next_time_s)
        if at_s != self._told_s:
            self._told_s = at_s
            self._turn.effects.append(WakeAt(at_s))

    def _arrive(self, arrived: Arrived) -> None:
        self.books.open(arrived.requests)
        self._inputs.settle()
        for request in arrived.requests:
            if self.recovery.is_blocked(request):
                self.books.end(quarantined(request, self._turn.now), None)
            elif self.replicas.availability.is_cut:
                self.books.end(unavailable(request, self._turn.now), None)
        fit = tuple(one for one in arrived.requests if self.register.is_open(one.key))
        if fit:
            self._flow.emit(arrived.ticket, SOURCE, 0, fit)

    def _end(self, ended: Ended) -> None:
        fault = None if ended.error is None else OperatorFault(ended.node, ended.error)
        self.books.end(ended.event, fault)

    def _signal(self, signal: Signal) -> None:
        """One of an unknown request does nothing."""
        if signal.request_id not in self.register.entries:
            return
        self.register.record_signal(signal)
        self._returns.end_waiting(signal)
        self._inputs.signal(signal)
        self.books.interrupt(signal)
        self._flow.retry_request(signal.request_id)

    def _release(self, released: Released) -> None:
        """Return credit, and let those that wait for it try again."""
        gate = released.node, released.replica
        key = released.request_id, released.choice
        if not self.gates.give(gate, key):
            return
        self.meter.services[gate].held.leave()
        unused = self.gates.reserved.gate_of(key)
        if unused is not None and len(self.gates.holders(*key)) == 1:  # it will not come there
            self.gates.give(unused, key)
        node, replica = gate
        num_left = self.gates.accounts[gate].requests
        self._inputs.report(
            CreditChanged(node=node, replica=replica, num_left=num_left, request_id=key[0])
        )
        self.books.let_go(key)
        self._flow.retry(node, replica)
        if unused is not None:
            self._flow.retry(*unused)

    def _emit(self, emitted: Emitted) -> None:
        node, replica, items = emitted.node, emitted.replica, emitted.items
        if self.outliers.suspects and any(getattr(item, "num_tokens", 0) for item in items):
            self.outliers.computed((self.plan.engine_name(node) or "", replica))
        self._flow.emit(emitted.ticket, node, replica, items, emitted.outlet)

    def _fail_over(self, failed: EngineFailed) -> None:
        engine = self.plan.engine_name(failed.node) or ""
        self.outliers.computed_wrong((engine, failed.replica))
        self._returns.fail_over(failed, engine, self.replicas.availability.num_present(engine))

    def _transfer(self, transferred: Transferred) -> None:
        note = self.outliers.passed if transferred.succeeded else self.outliers.failed
        note(transferred.sender, transferred.receiver)

    def _mark(self, marked: ReplicaMarked) -> None:
        self.replicas.mark(marked.engine, marked.replica, is_up=marked.is_up)
        self._flow.retry_all()

    def _remove(self, removed: ReplicaRemoved) -> None:
        """What was placed there finds out that it is lost, and is placed anew."""
        self.replicas.remove(removed.engine, removed.replica)
        self._flow.retry_all()

    def _wake(self) -> None:
        """Expire requests, wake operators, and end what has waited long enough."""
        now = self._turn.now
        for request_id in self.register.take_expired(now):
            self._signal(Signal("expire", request_id))
        for node in self.region.take_due(now):
            self._inputs.feed(node, Wake())
        for gate, request_ids in self.region.holds.take_due(now).items():
            self._flow.end_holds(*gate, request_ids, num_left=self.gates.accounts[gate].requests)
        availability = self.replicas.availability
        if availability.take_due(now):
            self._returns.end_unserved(availability.max_hold_s)
            self._flow.retry_all()
        self.outliers.readmit_due()
        self._told_s = math.nan  # whatever was told has passed: tell the next time anew


def _reactions_of(core: Core) -> dict[type, Callable[[Any], None]]:
    """What a core does at each kind of event."""
    return {
        Opened: core.replicas.open,
        Arrived: core._arrive,
        Emitted: core._emit,
        Withdrawn: lambda e: core._flow.withdraw(e.ticket),
        Released: core._release,
        Ended: core._end,
        Failed: lambda e: core.books.fail(OperatorFault(e.node, e.error), e.item),
        Finished: lambda e: core.books.finish(e.item, e.reason),
        Returned: core._returns.enter_again,
        EngineFailed: core._fail_over,
        Transferred: core._transfer,
        Reported: lambda e: core._inputs.report(e.feedback),
        CacheReported: lambda e: core.prefixes.report(e.changed),
        Signalled: lambda e: core._signal(e.signal),
        ReplicaAdded: lambda e: core.replicas.add(e.engine),
        ReplicaMarked: core._mark,
        ReplicaRemoved: core._remove,
        TimeCame: lambda e: core._wake(),
        Stopped: lambda e: core.books.fail_open(),
    }
