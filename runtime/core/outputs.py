"""What operators put out: one way to treat each kind, inside a transaction."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol, TypeAlias

from msgspec.structs import replace

from sagellm.runtime.core.answers import check_end, check_item
from sagellm.runtime.core.credit import Gates, NoCredit
from sagellm.runtime.core.faults import OperatorFault
from sagellm.runtime.core.holds import Holds
from sagellm.runtime.core.journal import Cell, Journal, Reached, Upstream
from sagellm.runtime.core.ways import Ways
from sagellm.runtime.messages import Item, Request
from sagellm.runtime.operator import (
    Announce,
    Emit,
    EmitAll,
    EmitFirst,
    Offer,
    Report,
    Terminate,
    Wait,
)
from sagellm.runtime.user_code import LEAVING, WrongResult, as_error

Sending: TypeAlias = Callable[[str, Item, str, float], None]
PutOut: TypeAlias = Callable[[Cell, Any, float, Sending], None]


class Passing(Protocol):
    """Passes items along edges; both raise NoCredit and OperatorFault."""

    def pass_on(self, node: str, item: Item, outlet: str, now: float) -> None: ...
    def pass_all(self, node: str, items: Sequence[Item], outlet: str, now: float) -> None: ...


class Outputs:
    """`by_type`: what is done with each kind of output of a cell, at which time. The last argument
    sends an item that the operator emits.
    """

    def __init__(
        self, passage: Passing, gates: Gates, journal: Journal, ways: Ways, holds: Holds
    ) -> None:
        self._passage = passage
        self._gates = gates
        self._journal = journal
        self._ways = ways
        self._holds = holds
        self.by_type: dict[type, PutOut] = {
            Emit: self._emit,
            EmitAll: self._emit_all,
            EmitFirst: self._emit_first,
            Wait: self._wait,
            Offer: self._offer,
            Terminate: self._terminate,
            Announce: self._announce,
            Report: self._report,
        }

    def _emit(self, cell: Cell, output: Emit, now: float, send: Sending) -> None:
        check_item(cell.operator, output.item)
        send(cell.name, output.item, output.outlet, now)

    def _emit_all(self, cell: Cell, output: EmitAll, now: float, send: Sending) -> None:
        self._passage.pass_all(cell.name, output.items, output.outlet, now)

    def _emit_first(self, cell: Cell, output: EmitFirst, now: float, send: Sending) -> None:
        """Raises the first NoCredit where no item finds any, or it is held back for the first."""
        refused: NoCredit | None = None
        mark, choices = self._journal.mark(), iter(output.choices)
        while (chosen := _next(cell, choices)) is not None:
            item, state = chosen
            try:
                self._passage.pass_on(cell.name, item, output.outlet, now)
                cell.state = state
                return
            except NoCredit as error:
                self._journal.roll_back(mark)
                if refused is None and output.hold_s and error.replica is not None:
                    way = error.node, error.replica
                    if self._holds.holds(cell.name, item, way, output.hold_s, now):
                        raise
                refused = refused or error
                if not self._gates.may_take(error.node, item):
                    break
        if refused is None:
            raise WrongResult("an EmitFirst has no item; give one at least")
        raise NoCredit(refused.node, None)

    def _wait(self, cell: Cell, output: Wait, now: float, send: Sending) -> None:
        raise NoCredit(output.node, None)

    def _offer(self, cell: Cell, output: Offer, now: float, send: Sending) -> None:
        """An item that an operator downstream fails on is taken, and ends as failed: it would
        else stay at the head of its queue, and fail every request that comes after it.
        """
        mark = self._journal.mark()
        for item in self._ways.worth_trying(cell.name, output.items):
            try:
                self._passage.pass_on(cell.name, _dispatched(item, now), output.outlet, now)
            except NoCredit as error:
                self._journal.roll_back(mark)
                self._ways.remember(item, error.node)
                continue
            except OperatorFault as fault:
                self._journal.roll_back(mark)
                self._journal.end(item, fault, now)
            self._journal.accepted.append((cell, item))
            return

    def _terminate(self, cell: Cell, output: Terminate, now: float, send: Sending) -> None:
        check_end(cell.operator, output)
        self._journal.counts.append((cell.meter.ended, 1))
        if output.event.finish_reason == "failed":
            self._journal.counts.append((cell.meter.errors, 1))
        fault = OperatorFault(cell.name, output.cause) if output.cause is not None else None
        self._journal.outcomes.append(Reached(output.event, terminal=True, fault=fault))

    def _announce(self, cell: Cell, output: Announce, now: float, send: Sending) -> None:
        self._journal.outcomes.append(Reached(output.forked))

    def _report(self, cell: Cell, output: Report, now: float, send: Sending) -> None:
        self._journal.outcomes.append(Upstream(cell.name, output.feedback))


def _next(cell: Cell, choices: Iterator[tuple[Item, Any]]) -> tuple[Item, Any] | None:
    """Made by the operator as it is wanted: its errors are its faults."""
    try:
        return next(choices, None)
    except (Exception, *LEAVING) as error:
        cell.meter.errors.count += 1
        raise OperatorFault(cell.name, as_error(error)) from error


def _dispatched(item: Item, now: float) -> Item:
    """A request as it leaves its queue, stamped with the time."""
    if not isinstance(item, Request):
        return item
    return replace(item, stamps=replace(item.stamps, dispatched_s=now))
