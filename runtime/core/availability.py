"""Which replicas of engines are there, what cannot be reached without the others, and how long
requests wait for an engine that has no replica.
"""

import math

from sagellm.runtime.core.credit import Gates
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
