"""The journal of a transaction over logic operators: records every change, to undo it if needed."""

from collections import deque
from collections.abc import Container
from typing import Any, TypeAlias

import msgspec

from sagellm.runtime.core.accounting import CommittedCount, LogicMeter
from sagellm.runtime.core.credit import CreditGate, Gates
from sagellm.runtime.core.effects import OperatorFault, ScaleTo, Send
from sagellm.runtime.feedback import Feedback
from sagellm.runtime.messages import ChoiceKey, Forked, Item
from sagellm.runtime.operator import Draw, Logic
from sagellm.runtime.user_function import failure_event

_Choices = dict[int, Item]


class HeldItems:
    """The items that each logic operator keeps: the latest item of each open choice.

    If the operator fails, these choices must end. `held`: the items by operator, request id and
    choice. `entries`: the ids of all open requests; items of closed requests are not recorded.
    """

    def __init__(self, nodes: tuple[str, ...], entries: Container[str]) -> None:
        self._entries = entries
        self.held: dict[str, dict[str, _Choices]] = {node: {} for node in nodes}

    def take(self, node: str, item: Item) -> None:
        """Record that an operator keeps an item."""
        if item.request_id in self._entries:
            self.held[node].setdefault(item.request_id, {})[item.choice] = item

    def send(self, node: str, item: Item) -> None:
        """Record that an operator has sent an item: its choice is no longer held there."""
        held = self.held.get(node, {})  # empty for the source and service operators
        if item.request_id in held:
            self._drop(held, item.request_id, item.choice)

    def forget(self, request_id: str, choice: int | None = None) -> None:
        """Drop a choice that has ended, or with None all choices of the request."""
        for held in self.held.values():
            if choice is None:
                held.pop(request_id, None)
            elif request_id in held:
                self._drop(held, request_id, choice)

    def of(self, node: str) -> tuple[Item, ...]:
        """The items held at an operator, in the order in which their requests came."""
        return tuple(item for choices in self.held[node].values() for item in choices.values())

    @staticmethod
    def _drop(held: dict[str, _Choices], request_id: str, choice: int) -> None:
        choices = held[request_id]
        choices.pop(choice, None)
        if not choices:
            del held[request_id]


class ReachedSink(msgspec.Struct):
    """An item reached the sink.

    `terminal`: whether it came over the implicit outlet `terminal`. `fault`: the fault that ended
    its choice, if any.
    """

    item: Item | Forked
    terminal: bool = False
    fault: OperatorFault | None = None


class UpstreamFeedback(msgspec.Struct):
    """Feedback from the logic operator `node` to operators upstream."""

    node: str
    feedback: Feedback


TransactionOutcome: TypeAlias = Send | ReachedSink | UpstreamFeedback | ScaleTo
Mark: TypeAlias = tuple[int, int, int, int, int, int, int]
START: Mark = (0, 0, 0, 0, 0, 0, 0)


class LogicCell:
    """One logic operator, with its state between inputs."""

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
    """The changes of one transaction.

    States and credit change at once, and `roll_back` restores them. Counts and held items change
    only on `commit`.
    """

    def __init__(self, cells: tuple[str, ...], gates: Gates, entries: Container[str]) -> None:
        """`entries`: the ids of all open requests."""
        self.held_items = HeldItems(cells, entries)
        self.held = self.held_items.held
        self.accepted: deque[tuple[LogicCell, Item]] = deque()  # offers without `OfferTaken` yet
        self.outcomes: list[TransactionOutcome] = []
        self._gates = gates
        self.cells: list[tuple[LogicCell, Any, int, float | None]] = []  # cells as they were before
        self._taken: list[tuple[CreditGate, ChoiceKey, CreditGate | None]] = []
        self._arrived: list[Item] = []  # items that arrived at the gate of their reservation
        self.counts: list[tuple[CommittedCount, int]] = []
        self.held_changes: list[tuple[str, Item, bool]] = []  # (operator, item, kept or sent)
        self.keeping: set[str] = set()  # operators that keep an item of this transaction

    def take(self, gate: CreditGate, item: Item, later: CreditGate | None) -> CreditGate | None:
        """Spend credit for an item at `gate`, and at the gate `later` that it will reach later.

        Spends nothing if the item reserved credit at `gate` before. Returns None, or the gate
        without credit.
        """
        if self._gates.reserved.is_at(gate, item.key):
            self._arrived.append(item)
        else:
            refusing = self._gates.take(gate, item, later)
            if refusing is not None:
                return refusing
            self._taken.append((gate, item.key, later))
        self.outcomes.append(Send(*gate, item))
        return None

    def keep(self, cell: LogicCell, item: Item) -> None:
        """Record that an operator keeps an item."""
        self.keeping.add(cell.name)
        self.held_changes.append((cell.name, item, True))

    def end(self, item: Item, fault: OperatorFault, now: float) -> None:
        """End the choice of an item on which an operator failed."""
        event = failure_event(item, fault.public, now=now)
        self.outcomes.append(ReachedSink(event, terminal=True, fault=fault))

    def mark(self) -> Mark:
        """The current position in the transaction, for `roll_back`."""
        return (
            len(self.cells), len(self._taken), len(self.accepted), len(self.outcomes),
            len(self.counts), len(self.held_changes), len(self._arrived),
        )  # fmt: skip

    def roll_back(self, mark: Mark) -> None:
        """Undo all changes after a mark."""
        cells, taken, accepted, outcomes, counts, held_changes, arrived = mark
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
        del self.outcomes[outcomes:], self.counts[counts:], self.held_changes[held_changes:]
        del self._arrived[arrived:]

    def commit(self) -> list[TransactionOutcome]:
        """Make all changes final, and return the outcomes in order."""
        self.cells.clear()
        if self._arrived:
            for item in self._arrived:
                self._gates.reserved.remove(item.key)
            self._arrived.clear()
        if self.counts:
            for committed, number in self.counts:
                committed.count += number
            self.counts.clear()
            if self._taken:  # empty if `counts` is: an edge counts every item that takes credit
                self._taken.clear()
        if self.held_changes:
            for node, item, is_in in self.held_changes:
                (self.held_items.take if is_in else self.held_items.send)(node, item)
            self.held_changes.clear()
            self.keeping.clear()
        outcomes = self.outcomes
        if outcomes:
            self.outcomes = []
        return outcomes
