"""The availability of engine replicas: closes their gates, and informs the operators."""

import math
from dataclasses import replace

from sagellm.runtime.core.accounting import Meter
from sagellm.runtime.core.credit import CreditGate, Gates
from sagellm.runtime.core.effects import Assigned, Ejected, Reaction
from sagellm.runtime.core.events import Opened
from sagellm.runtime.core.inputs import InputQueue
from sagellm.runtime.core.outliers import Outliers
from sagellm.runtime.core.prefix_indexes import PrefixIndexes
from sagellm.runtime.feedback import CreditChanged, HealthChanged, RoleAssigned
from sagellm.runtime.messages import EngineReplica
from sagellm.runtime.plan import Plan

_CHECKS_PER_HOLD = 8  # how often waiting requests are checked again within `max_hold_s`


class Availability:
    """Keeps track of which replicas are present, and closes and reopens their gates.

    `max_hold_s`: how long requests wait for an engine without any replica, in seconds. The time to
    mark a replica does not depend on the number of replicas, except for an engine's last replica.
    """

    def __init__(self, plan: Plan, gates: Gates, max_hold_s: float) -> None:
        self.plan = plan
        self.max_hold_s = max_hold_s
        self.gates = gates
        self._lost: set[EngineReplica] = set()
        self._num_lost: dict[str, int] = {}  # by engine
        self._removed: set[EngineReplica] = set()  # lost replicas that will not come back
        self._until_s: dict[str, float] = {}  # engines without a replica: when their requests end

    def mark(self, engine: str, replica: int, now: float, *, is_up: bool) -> None:
        """Mark a replica as lost or as up, and close or open its gates."""
        marked = EngineReplica(engine, replica)
        (self._mark_up if is_up else self._mark_lost)(marked)
        if self.num_present(engine):
            self._until_s.pop(engine, None)
        else:
            self._until_s.setdefault(engine, now + self.max_hold_s)
        self.gates.blocked = self._blocked()

    def remove(self, engine: str, replica: int) -> None:
        """Mark a lost replica as removed for good.

        Its gates open, so that requests that were placed there enter, fail and are placed again.
        """
        self._removed.add(EngineReplica(engine, replica))
        for node in self.plan.nodes_of(engine):
            gate = CreditGate(node, replica)
            self.gates.removed.add(gate)
            self.gates.reopen(gate)

    def is_lost(self, replica: EngineReplica) -> bool:
        return replica in self._lost

    def num_present(self, engine: str) -> int:
        """The number of replicas of an engine that are up."""
        return self.plan.engines.get(engine, 0) - self._num_lost.get(engine, 0)

    @property
    def is_cut(self) -> bool:
        """Whether no path is left through the graph: all its last engine operators are blocked."""
        if not self._until_s:
            return False
        return all(node in self.gates.blocked for node in self.plan.last_engine_nodes)

    @property
    def next_end_s(self) -> float:
        """The time at which the first waiting request has waited `max_hold_s`."""
        return min(self._until_s.values(), default=math.inf)

    def take_due(self, now: float) -> bool:
        """Whether some waiting request may have waited `max_hold_s` at `now`.

        Schedules the next check for the requests that came later.
        """
        late = [engine for engine, until_s in self._until_s.items() if until_s <= now]
        for engine in late:
            self._until_s[engine] = now + self.max_hold_s / _CHECKS_PER_HOLD
        return bool(late)

    def _mark_up(self, replica: EngineReplica) -> None:
        engine, number = replica
        if replica in self._lost:
            self._lost.discard(replica)
            self._num_lost[engine] -= 1
        self._removed.discard(replica)
        for node in self.plan.nodes_of(engine):
            gate = CreditGate(node, number)
            self.gates.removed.discard(gate)
            self.gates.reopen(gate)

    def _mark_lost(self, replica: EngineReplica) -> None:
        engine, number = replica
        if replica not in self._lost:
            self._lost.add(replica)
            self._num_lost[engine] = self._num_lost.get(engine, 0) + 1
        if replica not in self._removed:  # the gates of a removed replica stay open
            for node in self.plan.nodes_of(engine):
                self.gates.close(CreditGate(node, number))

    def _blocked(self) -> frozenset[str]:
        """The operators that must take no items.

        These are the operators of an engine without replicas, and all engine operators upstream of
        them: nothing could process their results.
        """
        plan, blocked = self.plan, set[str]()
        for engine in self._until_s:
            for node in plan.nodes_of(engine):
                before = [name for name in plan.ancestors(node) if plan.engine_name(name)]
                blocked.update((node, *before))
        return frozenset(blocked)


class ReplicaSet:
    """Applies changes of the replicas of engines to the plan, the gates and the operators.

    `num_replicas`: the number of replicas of each service operator; a shared dict that `add`
    updates.
    """

    def __init__(
        self,
        plan: Plan,
        reaction: Reaction,
        gates: Gates,
        meter: Meter,
        inputs: InputQueue,
        prefixes: PrefixIndexes,
        num_replicas: dict[str, int],
        max_hold_s: float,
    ) -> None:
        self.plan = plan
        self.availability = Availability(plan, gates, max_hold_s)
        self.outliers = Outliers(self.availability, reaction.time, self._eject)
        self._reaction = reaction
        self._gates = gates
        self._meter = meter
        self._inputs = inputs
        self._prefixes = prefixes
        self._num_replicas = num_replicas
        self.has_opened = False  # a gate was opened to a role, and parked items may go on
        inputs.assign = self.assign

    @property
    def next_time_s(self) -> float:
        """The time at which the next hold of requests, or ejection of a replica, ends."""
        return min(self.availability.next_end_s, self.outliers.next_end_s)

    def open(self, opened: Opened) -> None:
        """Open the gate of a replica of a service operator, and report its credit."""
        gate = CreditGate(opened.node, opened.replica)
        self._gates.open(gate, opened.capacity, opened.block_size)
        num_left = self._gates.accounts[gate].requests
        credit = CreditChanged(node=opened.node, replica=opened.replica, num_left=num_left)
        self._inputs.report(credit)
        engine = self.plan.engine_name(opened.node)
        if engine is not None and self.plan.nodes_of(engine)[0] == opened.node:
            self._prefixes.ask(engine, opened.replica)

    def add(self, engine: str) -> None:
        """Add a replica to an engine. The replica gets no items before it is marked as up."""
        number = self.plan.engines[engine]
        self._change(self.plan.with_replica(engine))
        for node in self.plan.nodes_of(engine):
            self._num_replicas[node] = number + 1
            self._meter.add(node, number)
        self.mark(engine, number, is_up=False)

    def mark(self, engine: str, number: int, *, is_up: bool) -> None:
        """Apply the loss or the return of a replica to gates, outliers, prefixes and operators."""
        replica = EngineReplica(engine, number)
        self.availability.mark(engine, number, self._reaction.now, is_up=is_up)
        self.outliers.forget(replica)
        if is_up:
            self._prefixes.ask(engine, number)
        else:
            self._prefixes.lose(engine, number)
        if is_up and replica in self.plan.removed:
            self._change(replace(self.plan, removed=self.plan.removed - {replica}))
        self._report_health(replica, is_up=is_up)

    def remove(self, engine: str, number: int) -> None:
        """Remove a lost replica from the plan for good."""
        self.availability.remove(engine, number)
        self._change(
            replace(self.plan, removed=self.plan.removed | {EngineReplica(engine, number)})
        )

    def assign(self, assigned: RoleAssigned) -> HealthChanged:
        """Open or close the gate of a replica, and return the health that operators see."""
        node, number, is_on = assigned.operator, assigned.number, assigned.is_on
        self._gates.assign(CreditGate(node, number), is_on=is_on)
        self._reaction.effects.append(Assigned(node, number, is_on))
        self.has_opened = self.has_opened or is_on
        replica = EngineReplica(self.plan.engine_name(node) or "", number)
        is_up = is_on and not self.availability.is_lost(replica)
        return HealthChanged(node=node, replica=number, is_up=is_up)

    def _change(self, plan: Plan) -> None:
        self.plan = self.availability.plan = replace(plan, epoch=self.plan.epoch + 1)
        self._inputs.change(self.plan.topology)

    def _eject(self, replica: EngineReplica, for_s: float) -> None:
        """Announce that a replica is ejected for `for_s` seconds, or with 0 is readmitted."""
        self._reaction.effects.append(Ejected(*replica, for_s))
        self._report_health(replica, is_up=for_s == 0)

    def _report_health(self, replica: EngineReplica, *, is_up: bool) -> None:
        """Report the health of a replica to its subscribers.

        The end of an ejection does not make a lost replica up.
        """
        engine, number = replica
        is_up = is_up and not self.availability.is_lost(replica)
        for node in self.plan.nodes_of(engine):
            is_assigned = CreditGate(node, number) not in self._gates.unassigned
            health = HealthChanged(node=node, replica=number, is_up=is_up and is_assigned)
            self._inputs.report(health)
