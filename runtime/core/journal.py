"""A journal: what a transaction over logic operators has changed, so that it can be undone."""

from collections import deque
from collections.abc import Container
from typing import Any, TypeAlias

import msgspec

from sagellm.runtime.core.credit import Gate, Gates, Key
from sagellm.runtime.core.effects import Send
from sagellm.runtime.core.faults import OperatorFault
from sagellm.runtime.core.holdings import Holdings
from sagellm.runtime.core.meter import LogicMeter, Tally
from sagellm.runtime.feedback import Feedback
from sagellm.runtime.messages import Forked, Item
from sagellm.runtime.operator import Draw, Logic
from sagellm.runtime.user_function import failing


class Reached(msgspec.Struct):
    """An item reached the sink. `terminal`: over the implicit outlet; `fault`: what ended it."""

    item: Item | Forked
    terminal: bool = False
    fault: OperatorFault | None = None


class Upstream(msgspec.Struct):
    """Feedback of a logic operator for those upstream."""

    node: str
    feedback: Feedback


Outcome: TypeAlias = Send | Reached | Upstream
Mark: TypeAlias = tuple[int, int, int, int, int, int, int]
START: Mark = (0, 0, 0, 0, 0, 0, 0)


class Cell:
    """One logic operator, and what is kept of it between inputs."""

    __slots__ = (
        "draw", "initial", "meter", "name", "num_inputs", "on", "operator", "state", "wake_at",
    )  # fmt: skip

    def __init__(self, name: str, operator: Logic[Any], meter: LogicMeter, seed: int = 0) -> None:
        self.name = name
        self.operator = operator
        self.on = operator.on
        self.meter = meter
        self.draw = Draw(seed, name, 0)
        self.initial = self.state = operator.initial
        self.num_inputs = 0
        self.wake_at: float | None = None


class Journal:
    """Changes of one transaction. Counts and holdings change only where it is committed."""

    def __init__(self, cells: tuple[str, ...], gates: Gates, entries: Container[str]) -> None:
        """`entries`: the ids of the requests that are open."""
        self.holdings = Holdings(cells, entries)
        self.held = self.holdings.held
        self.accepted: deque[tuple[Cell, Item]] = deque()  # offers to answer
        self.outcomes: list[Outcome] = []
        self._gates = gates
        self.cells: list[tuple[Cell, Any, int, float | None]] = []  # as they were
        self._taken: list[tuple[Gate, Key, Gate | None]] = []
        self._arrived: list[Item] = []  # at operators where their credit was reserved
        self.counts: list[tuple[Tally, int]] = []
        self.moves: list[tuple[str, Item, bool]] = []  # operator, item, and whether it came in
        self.keeping: set[str] = set()  # operators that items came to

    def take(self, gate: Gate, item: Item, later: Gate | None) -> Gate | None:
        """Spend credit for an item, also at the gate `later`; returns the gate that has none."""
        if self._gates.reserved.is_at(gate, item.key):
            self._arrived.append(item)
        else:
            refusing = self._gates.take(gate, item, later)
            if refusing is not None:
                return refusing
            self._taken.append((gate, item.key, later))
        self.outcomes.append(Send(*gate, item))
        return None

    def came(self, cell: Cell, item: Item) -> None:
        """An operator keeps an item."""
        self.keeping.add(cell.name)
        self.moves.append((cell.name, item, True))

    def end(self, item: Item, fault: OperatorFault, now: float) -> None:
        """End the choice of an item that an operator failed on."""
        event = failing(item, fault.public, now=now)
        self.outcomes.append(Reached(event, terminal=True, fault=fault))

    def mark(self) -> Mark:
        """How far the transaction is, for `roll_back`."""
        return (
            len(self.cells), len(self._taken), len(self.accepted), len(self.outcomes),
            len(self.counts), len(self.moves), len(self._arrived),
        )  # fmt: skip

    def roll_back(self, mark: Mark) -> None:
        cells, taken, accepted, outcomes, counts, moves, arrived = mark
        while len(self.cells) > cells:
            cell, *before = self.cells.pop()
            cell.state, cell.num_inputs, cell.wake_at = before
        while len(self._taken) > taken:
            gate, key, later = self._taken.pop()
            self._gates.give(gate, key)
            if later is not None:
                self._gates.give(later, key)
        while len(self.accepted) > accepted:
            self.accepted.pop()
        del self.outcomes[outcomes:], self.counts[counts:], self.moves[moves:]
        del self._arrived[arrived:]

    def commit(self) -> list[Outcome]:
        """Make the changes final, and return what they lead to, in order."""
        self.cells.clear()
        if self._arrived:
            for item in self._arrived:
                self._gates.reserved.remove(item.key)
            self._arrived.clear()
        if self.counts:
            for tally, number in self.counts:
                tally.count += number
            self.counts.clear()
            if self._taken:
                self._taken.clear()
        if self.moves:
            for node, item, is_in in self.moves:
                (self.holdings.take if is_in else self.holdings.send)(node, item)
            self.moves.clear()
            self.keeping.clear()
        outcomes = self.outcomes
        if outcomes:
            self.outcomes = []
        return outcomes
