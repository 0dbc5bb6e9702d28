"""The logic operators of a graph: each input is one transaction over their states."""

import math
from collections.abc import Container, Mapping, Sequence
from typing import Any

from sagellm.graphs.ir import Graph
from sagellm.runtime.core.accounting import Meter
from sagellm.runtime.core.credit import Gates, NoCredit
from sagellm.runtime.core.journal import START, Journal, LogicCell, TransactionOutcome
from sagellm.runtime.core.outputs import state_was_lost
from sagellm.runtime.core.propagation import Propagation
from sagellm.runtime.messages import Item
from sagellm.runtime.operator import Input, Logic
from sagellm.runtime.user_code import WrongResult


class LogicGraph:
    """Runs the logic operators of a graph, without I/O or a clock.

    `feed`, `send` and `send_all` are transactions: they run all operators that the input reaches
    and return the outcomes, or they raise and change nothing.
    """

    def __init__(
        self,
        graph: Graph,
        logic: Mapping[str, Logic[Any]],
        gates: Gates,
        num_replicas: Mapping[str, int],
        *,
        seed: int = 0,
        meter: Meter | None = None,
        entries: Container[str] = (),
    ) -> None:
        """`entries`: the ids of the open requests."""
        meter = meter or Meter(graph, logic)
        self.cells = {
            name: LogicCell(name, made, meter.logic[name], seed) for name, made in logic.items()
        }
        self.undone: tuple[str, ...] = ()  # operators in the last transaction that had no credit
        self._journal = Journal(tuple(logic), gates, entries)
        self.held_items = self._journal.held_items
        self._propagation = Propagation(
            graph, self.cells, gates, self._journal, meter, num_replicas
        )
        self.holds = self._propagation.holds
        self._next_wake_s = math.inf

    @property
    def wakes_changed(self) -> bool:
        """Whether `next_wake_s` may have changed since it was read."""
        return self._propagation.wakes_changed or self.holds.has_changed

    @property
    def next_wake_s(self) -> float:
        """The time of the first wake-up of an operator, or of the first end of a hold."""
        if self._propagation.wakes_changed:
            self._propagation.wakes_changed = False
            wakes = (cell.wake_at for cell in self.cells.values() if cell.wake_at is not None)
            self._next_wake_s = min(wakes, default=math.inf)
        return min(self._next_wake_s, self.holds.next_end_s)

    def take_due(self, now: float) -> list[str]:
        """Take and return the operators whose wake-up is due; they must ask for the next one."""
        due = []
        for name, cell in self.cells.items():
            if cell.wake_at is not None and cell.wake_at <= now:
                cell.wake_at, self._propagation.wakes_changed = None, True
                due.append(name)
        return due

    def forget(self, request_id: str) -> None:
        """Drop the refusals and holds of a request that has ended."""
        self._propagation.refusals.forget(request_id)
        self.holds.forget(request_id)

    def restart(self, node: str) -> None:
        """Reset an operator to its initial state, after a fault that ends all requests in it.

        The caller ends the requests of the items that the operator held.
        """
        cell = self.cells[node]
        cell.state, cell.wake_at, self._propagation.wakes_changed = cell.initial, None, True

    def lost(self, node: str) -> WrongResult | None:
        """The error of an operator that has dropped held items from its state; None if it did not.

        An operator that asked for a wake-up is not checked: it may still send the items.
        """
        cell, items = self.cells[node], self.held_items.of(node)
        if not items or cell.wake_at is not None:
            return None
        return state_was_lost(cell.operator, cell.state, cell.initial, items)

    def feed(self, node: str, happened: Input, now: float) -> list[TransactionOutcome]:
        """Give an operator an input, and return the outcomes.

        Raises NoCredit and OperatorFault; then nothing has changed.
        """
        try:
            has_led_on = self._propagation.run_input(self.cells[node], happened, now)
        except BaseException as error:
            self._undo(error)
            raise
        if not has_led_on:  # most feedback: only the cells have to be committed
            self._journal.cells.clear()
            return self._journal.outcomes  # an empty list
        return self._journal.commit()

    def send(self, source: str, item: Item, outlet: str, now: float) -> list[TransactionOutcome]:
        """Send an item from the source or a service operator, and return the outcomes.

        Raises as `feed` does.
        """
        try:
            self._propagation.propagate(source, item, outlet, now)
        except BaseException as error:
            self._undo(error)
            raise
        return self._journal.commit()

    def send_all(
        self, source: str, items: Sequence[Item], outlet: str, now: float
    ) -> list[TransactionOutcome]:
        """Send items in one transaction. Raises as `feed` does if any of the items fails."""
        try:
            self._propagation.propagate_batch(source, items, outlet, now)
        except BaseException as error:
            self._undo(error)
            raise
        return self._journal.commit()

    def _undo(self, error: BaseException) -> None:
        if isinstance(error, NoCredit):
            self.undone = tuple(kept[0].name for kept in self._journal.cells)
        self._journal.roll_back(START)
        self._propagation.wakes_changed = True  # rolled-back cells may have other wake-up times
