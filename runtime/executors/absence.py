"""Which engines are missing, what cannot be reached without them, and how long that is borne."""

import math

from sagellm.runtime.executors.credit import Gate
from sagellm.runtime.plan import Plan

_LOOKS = 8  # within the time that requests wait


class Absence:
    """`max_hold_s`: how long requests wait for an engine of which no replica is there."""

    def __init__(self, plan: Plan, max_hold_s: float) -> None:
        self._plan = plan
        self.max_hold_s = max_hold_s
        self._lost: set[tuple[str, int]] = set()  # replicas of engines
        self._removed: set[tuple[str, int]] = set()  # of those: not to come back
        self._until_s: dict[str, float] = {}  # of engines without any

    def mark(self, engine: str, replica: int, now: float, *, is_up: bool) -> None:
        """A replica of an engine is lost, or is back."""
        (self._lost.discard if is_up else self._lost.add)((engine, replica))
        if is_up:
            self._removed.discard((engine, replica))
        if not self._is_missing(engine):
            self._until_s.pop(engine, None)
        else:
            self._until_s.setdefault(engine, now + self.max_hold_s)

    def remove(self, engine: str, replica: int) -> None:
        """A replica that was lost is not to come back."""
        self._removed.add((engine, replica))

    def is_lost(self, replica: tuple[str, int]) -> bool:
        return replica in self._lost

    def num_present(self, engine: str) -> int:
        """The replicas of an engine that are up."""
        numbers = range(len(self._plan.engines.get(engine, ())))
        return sum((engine, number) not in self._lost for number in numbers)

    @property
    def shut(self) -> frozenset[Gate]:
        """The replicas of operators that take no new request: those whose engine is lost, and those
        that are locked. One that was removed is open: what was placed there is lost there.
        """
        lost = {
            (node, number)
            for node in (self._engine_nodes if self._lost else ())
            for name, number in self._lost - self._removed
            if name == self._plan.engine_name(node)
        }
        return frozenset(lost) | self.locked

    @property
    def locked(self) -> frozenset[Gate]:
        """Where no replica of an engine is left: all its operators, and all before them: what they
        compute would find nowhere to go. Whatever comes there waits.
        """
        plan, locked = self._plan, set[Gate]()
        for node in self._engine_nodes if self._lost else ():
            if self._is_missing(plan.engine_name(node) or ""):
                before = [name for name in plan.ancestors(node) if plan.engine_name(name)]
                locked |= {
                    (name, number) for name in (node, *before) for number in self._numbers(name)
                }
        return frozenset(locked)

    @property
    def is_cut(self) -> bool:
        """Whether no way through the graph is left."""
        if not self._until_s:
            return False
        nodes, shut = self._engine_nodes, self.shut
        before = {name for node in nodes for name in self._plan.ancestors(node)}
        last = [node for node in nodes if node not in before]
        return all((node, number) in shut for node in last for number in self._numbers(node))

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

    @property
    def _engine_nodes(self) -> tuple[str, ...]:
        return tuple(node for node in self._plan.services if self._plan.engine_name(node))

    def _numbers(self, node: str) -> list[int]:
        """The replicas of an operator that are there, or may come back."""
        engine = self._plan.engine_name(node)
        every = range(self._plan.replicas[node])
        return [number for number in every if (engine, number) not in self._removed]

    def _is_missing(self, engine: str) -> bool:
        numbers = range(len(self._plan.engines.get(engine, ())))
        return bool(numbers) and all((engine, number) in self._lost for number in numbers)
