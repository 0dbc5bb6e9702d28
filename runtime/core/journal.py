"""A journal: what a transaction over logic operators has changed, so that it can be undone."""

from collections import deque
from collections.abc import Container
from dataclasses import dataclass
from typing import Any, TypeAlias

from sagellm.runtime.core.credit import Gates
from sagellm.runtime.core.effects import Send
from sagellm.runtime.core.faults import OperatorFault
from sagellm.runtime.core.holdings import Holdings
from sagellm.runtime.core.meter import LogicMeter, Tally
from sagellm.runtime.feedback import Feedback
from sagellm.runtime.messages import Forked, Item
from sagellm.runtime.operator import Logic


@dataclass(slots=True)
class Reached:
    """An item reached the sink. `terminal`: over the implicit outlet; `fault`: what ended it."""

    item: Item | Forked
    terminal: bool = False
    fault: OperatorFault | None = None


@dataclass(slots=True)
class Upstream:
    """Feedback of a logic operator for those upstream."""

    node: str
    feedback: Feedback


Outcome: TypeAlias = Send | Reached | Upstream
_Mark: TypeAlias = tuple[int, int, int, int, int, int]


class Cell:
    """One logic operator, and what is kept of it between inputs."""

    __slots__ = ("initial", "meter", "name", "num_inputs", "operator", "state", "wake_at")

    def __init__(self, name: str, operator: Logic[Any], meter: LogicMeter) -> None:
        self.name = name
        self.operator = operator
        self.meter = meter
        self.initial = self.state = operator.initial
        self.num_inputs = 0
        self.wake_at: float | None = None


class Journal:
    """Changes of one transaction. Counts and holdings change only where it is committed."""

    def __init__(self, cells: tuple[str, ...], gates: Gates, entries: Container[str]) -> None:
        """`entries`: the ids of the requests that are open."""
        self.holdings = Holdings(cells, entries)
        self.accepted: deque[tuple[Cell, Item]] = deque()  # offers to answer
        self.outcomes: list[Outcome] = []
        self._gates = gates
        self._cells: list[tuple[Cell, Any, int, float | None]] = []  # as they were
        self._taken: list[Send] = []
        self._counts: list[tuple[Tally, int]] = []
        self._moves: list[tuple[str, Item, bool]] = []  # operator, item, and whether it came in

    def keep(self, cell: Cell) -> None:
        """Keep a cell as it is now."""
        self._cells.append((cell, cell.state, cell.num_inputs, cell.wake_at))

    def take(self, node: str, replica: int, item: Item) -> bool:
        """Spend credit for an item; False where there is none."""
        if not self._gates.take((node, replica), item):
            return False
        send = Send(node, replica, item)
        self._taken.append(send)
        self.outcomes.append(send)
        return True

    def count(self, tally: Tally, number: int = 1) -> None:
        self._counts.append((tally, number))

    def came(self, cell: Cell, item: Item) -> None:
        """An operator keeps an item."""
        self._moves.append((cell.name, item, True))

    def left(self, node: str, item: Item) -> None:
        """A node sends an item: an operator holds its choice no more."""
        if self._moves or self.holdings.held.get(node):
            self._moves.append((node, item, False))

    def mark(self) -> _Mark:
        """How far the transaction is, for `roll_back`."""
        return (
            len(self._cells), len(self._taken), len(self.accepted),
            len(self.outcomes), len(self._counts), len(self._moves),
        )  # fmt: skip

    def roll_back(self, mark: _Mark) -> None:
        cells, taken, accepted, outcomes, counts, moves = mark
        while len(self._cells) > cells:
            cell, *before = self._cells.pop()
            cell.state, cell.num_inputs, cell.wake_at = before
        while len(self._taken) > taken:
            send = self._taken.pop()
            self._gates.give((send.node, send.replica), send.item.key)
        while len(self.accepted) > accepted:
            self.accepted.pop()
        del self.outcomes[outcomes:], self._counts[counts:], self._moves[moves:]

    def changed_since(self, mark: _Mark) -> tuple[str, ...]:
        """The operators that have run since the mark."""
        return tuple(entry[0].name for entry in self._cells[mark[0] :])

    def commit(self) -> list[Outcome]:
        """Make the changes final, and return what they lead to, in order."""
        for tally, number in self._counts:
            tally.count += number
        for node, item, is_in in self._moves:
            (self.holdings.take if is_in else self.holdings.send)(node, item)
        outcomes, self.outcomes = self.outcomes, []
        self._cells.clear()
        self._taken.clear()
        self._counts.clear()
        self._moves.clear()
        return outcomes
