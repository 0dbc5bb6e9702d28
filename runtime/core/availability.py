"""The availability of engine replicas, and what the core does as it changes."""

import math
from dataclasses import replace

from sagellm.runtime.core.accounting import Meter
from sagellm.runtime.core.credit import Gates
from sagellm.runtime.core.effects import Ejected, Reaction
from sagellm.runtime.core.events import Opened
from sagellm.runtime.core.inputs import InputQueue
from sagellm.runtime.core.outliers import Outliers
from sagellm.runtime.core.prefix_indexes import PrefixIndexes
from sagellm.runtime.feedback import CreditChanged, HealthChanged
from sagellm.runtime.plan import Plan

_LOOKS = 8  # within the time that requests wait

Replica = tuple[str, int]  # an engine's name and a number


class Availability:
    """Closes and reopens gates as replicas are lost and come back.

    `max_hold_s`: how long requests wait for an engine of which no replica is there. Marking one
    replica costs the same however many there are, but for the last one of an engine.
    """

    def __init__(self, plan: Plan, gates: Gates, max_hold_s: float) -> None:
        self.plan = plan
        self.max_hold_s = max_hold_s
        self.gates = gates
        self._lost: set[Replica] = set()
        self._num_lost: dict[str, int] = {}  # by engine
        self._removed: set[Replica] = set()  # of those that are lost: not to come back
        self._until_s: dict[str, float] = {}  # of engines without any replica

    def mark(self, engine: str, replica: int, now: float, *, is_up: bool) -> None:
        """A replica of an engine is lost, or is back."""
        if is_up:
            self._mark_up((engine, replica))
        else:
            self._mark_lost((engine, replica))
        if self.num_present(engine):
            self._until_s.pop(engine, None)
        else:
            self._until_s.setdefault(engine, now + self.max_hold_s)
        self.gates.blocked = self._blocked()

    def remove(self, engine: str, replica: int) -> None:
        """A replica that was lost is not to come back. Its gates open: what was placed there finds
        out that it is lost, and is placed anew.
        """
        self._removed.add((engine, replica))
        for node in self.plan.nodes_of(engine):
            self.gates.removed.add((node, replica))
            self.gates.reopen((node, replica))

    def is_lost(self, replica: Replica) -> bool:
        return replica in self._lost

    def num_present(self, engine: str) -> int:
        """The replicas of an engine that are up."""
        return self.plan.engines.get(engine, 0) - self._num_lost.get(engine, 0)

    @property
    def is_cut(self) -> bool:
        """Whether no way through the graph is left."""
        if not self._until_s:
            return False
        return all(node in self.gates.blocked for node in self.plan.last_engine_nodes)

    @property
    def next_end_s(self) -> float:
        """When somebody has waited long enough."""
        return min(self._until_s.values(), default=math.inf)

    def take_due(self, now: float) -> bool:
        """Whether that is now; it is looked at again soon, for those that came later."""
        late = [engine for engine, until_s in self._until_s.items() if until_s <= now]
        for engine in late:
            self._until_s[engine] = now + self.max_hold_s / _LOOKS
        return bool(late)

    def _mark_up(self, replica: Replica) -> None:
        engine, number = replica
        if replica in self._lost:
            self._lost.discard(replica)
            self._num_lost[engine] -= 1
        self._removed.discard(replica)
        for node in self.plan.nodes_of(engine):
            self.gates.removed.discard((node, number))
            self.gates.reopen((node, number))

    def _mark_lost(self, replica: Replica) -> None:
        engine, number = replica
        if replica not in self._lost:
            self._lost.add(replica)
            self._num_lost[engine] = self._num_lost.get(engine, 0) + 1
        if replica not in self._removed:
            for node in self.plan.nodes_of(engine):
                self.gates.close((node, number))

    def _blocked(self) -> frozenset[str]:
        """Where no replica of an engine is left: all its operators, and all engines' operators
        before them, for what they compute would find nowhere to go.
        """
        plan, blocked = self.plan, set[str]()
        for engine in self._until_s:
            for node in plan.nodes_of(engine):
                before = [name for name in plan.ancestors(node) if plan.engine_name(name)]
                blocked.update((node, *before))
        return frozenset(blocked)


class ReplicaSet:
    """Keeps the plan, the gates and the operators that place requests informed of the replicas.

    `num_replicas`: by service operator; it is kept up to date here.
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

    @property
    def next_time_s(self) -> float:
        """When a hold ends, or an ejection."""
        return min(self.availability.next_end_s, self.outliers.next_end_s)

    def open(self, opened: Opened) -> None:
        """A replica of a service operator is there, and grants credit."""
        gate = opened.node, opened.replica
        self._gates.open(gate, opened.capacity, opened.block_size)
        num_left = self._gates.accounts[gate].requests
        credit = CreditChanged(node=opened.node, replica=opened.replica, num_left=num_left)
        self._inputs.report(credit)
        engine = self.plan.engine_name(opened.node)
        if engine is not None and self.plan.nodes_of(engine)[0] == opened.node:
            self._prefixes.ask(engine, opened.replica)

    def add(self, engine: str) -> None:
        """An engine has one more replica, which takes nothing before it is marked as up."""
        number = self.plan.engines[engine]
        self._change(self.plan.with_replica(engine))
        for node in self.plan.nodes_of(engine):
            self._num_replicas[node] = number + 1
            self._meter.add(node, number)
        self.mark(engine, number, is_up=False)

    def mark(self, engine: str, number: int, *, is_up: bool) -> None:
        """Close the ways to a replica that is lost, or open them to one that is back."""
        self.availability.mark(engine, number, self._reaction.now, is_up=is_up)
        self.outliers.forget((engine, number))
        if is_up:
            self._prefixes.ask(engine, number)
        else:
            self._prefixes.lose(engine, number)
        if is_up and (engine, number) in self.plan.removed:
            self._change(replace(self.plan, removed=self.plan.removed - {(engine, number)}))
        self._report_health((engine, number), is_up=is_up)

    def remove(self, engine: str, number: int) -> None:
        """A replica that was lost is not to come back."""
        self.availability.remove(engine, number)
        self._change(replace(self.plan, removed=self.plan.removed | {(engine, number)}))

    def _change(self, plan: Plan) -> None:
        self.plan = self.availability.plan = replace(plan, epoch=self.plan.epoch + 1)
        self._inputs.change(self.plan.topology)

    def _eject(self, replica: Replica, for_s: float) -> None:
        """A replica is ejected for some time, or is back."""
        self._reaction.effects.append(Ejected(*replica, for_s))
        self._report_health(replica, is_up=for_s == 0)

    def _report_health(self, replica: Replica, *, is_up: bool) -> None:
        """A replica that is lost is never reported to be up."""
        engine, number = replica
        is_up = is_up and not self.availability.is_lost(replica)
        for node in self.plan.nodes_of(engine):
            self._inputs.report(HealthChanged(node=node, replica=number, is_up=is_up))
