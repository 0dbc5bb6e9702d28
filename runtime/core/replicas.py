"""The replicas of engines: which there are, which are up, and who is told of it."""

from dataclasses import replace

from sagellm.runtime.core.availability import Availability, Replica
from sagellm.runtime.core.credit import Gates
from sagellm.runtime.core.effects import Ejected
from sagellm.runtime.core.events import Opened
from sagellm.runtime.core.inputs import Inputs
from sagellm.runtime.core.meter import Meter
from sagellm.runtime.core.outliers import Outliers
from sagellm.runtime.core.prefixes import Prefixes
from sagellm.runtime.core.turn import Turn
from sagellm.runtime.feedback import CreditChanged, HealthChanged
from sagellm.runtime.plan import Plan


class Replicas:
    """Keeps the plan, the gates and the operators that place requests informed of the replicas.

    `num_replicas`: by service operator; it is kept up to date here.
    """

    def __init__(
        self,
        plan: Plan,
        turn: Turn,
        gates: Gates,
        meter: Meter,
        inputs: Inputs,
        prefixes: Prefixes,
        num_replicas: dict[str, int],
        max_hold_s: float,
    ) -> None:
        self.plan = plan
        self.availability = Availability(plan, gates, max_hold_s)
        self.outliers = Outliers(self.availability, turn.time, self._eject)
        self._turn = turn
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
        self.availability.mark(engine, number, self._turn.now, is_up=is_up)
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
        self._turn.effects.append(Ejected(*replica, for_s))
        self._report_health(replica, is_up=for_s == 0)

    def _report_health(self, replica: Replica, *, is_up: bool) -> None:
        """A replica that is lost is never reported to be up."""
        engine, number = replica
        is_up = is_up and not self.availability.is_lost(replica)
        for node in self.plan.nodes_of(engine):
            self._inputs.report(HealthChanged(node=node, replica=number, is_up=is_up))
