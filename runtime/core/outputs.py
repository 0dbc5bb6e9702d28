"""Outputs of operators: how each kind is checked and carried out inside a transaction.

A wrong output raises an error, which ends the requests concerned; ignoring it would lose them.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Protocol, TypeAlias

from msgspec.structs import replace

from sagellm.runtime.core.credit import CreditGate, Gates, NoCredit
from sagellm.runtime.core.effects import OperatorFault, ScaleTo
from sagellm.runtime.core.journal import Journal, LogicCell, ReachedSink, UpstreamFeedback
from sagellm.runtime.core.parking import Holds, RefusalCache
from sagellm.runtime.messages import Answer, Item, Prefilled, Request, TokenEvent
from sagellm.runtime.operator import (
    Announce,
    Arrival,
    Emit,
    EmitAll,
    EmitFirst,
    Input,
    Offer,
    OperatorOutput,
    Report,
    ScaleEngine,
    Step,
    Terminate,
    Wait,
)
from sagellm.runtime.user_code import LEAVING, WrongResult, as_error, kind_of, place_of_code

ITEMS = frozenset({TokenEvent, Request, Prefilled, Answer})
_LOST = "its request would never end: emit or terminate it"


def must_be_answered(item: Item) -> bool:
    """Whether the request of an item would never end if an operator dropped the item.

    False only for tokens that do not end their choice.
    """
    return not isinstance(item, TokenEvent) or item.is_last


def check_step(operator: Any, happened: Input, step: object, before: object) -> None:
    """Raise WrongResult if the answer to an input is no valid Step, or loses an arrived item.

    The item is lost if the Step has no outputs, the same state as `before` and no wake-up.
    """
    if not isinstance(step, Step):
        raise wrong_result(operator.on, f"`on` returned {kind_of(step)}; a Step was wanted")
    if not isinstance(step.outputs, tuple):
        kind = kind_of(step.outputs)
        raise wrong_result(operator.on, f"the outputs of its Step are {kind}; a tuple was wanted")
    if step.wake_at is not None and not _is_time(step.wake_at):
        kind = kind_of(step.wake_at)
        raise wrong_result(
            operator.on, f"the wake_at of its Step is {kind}; a finite number was wanted"
        )
    if step.outputs or step.state is not before or step.wake_at is not None:
        return
    if isinstance(happened, Arrival) and must_be_answered(happened.item):
        kind = type(happened.item).__name__
        raise wrong_result(
            operator.on, f"`on` took a {kind}, kept nothing and sent nothing; {_LOST}"
        )


def _is_time(value: object) -> bool:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return is_number and -math.inf < value < math.inf  # type: ignore[operator]


def state_was_lost(
    operator: Any, state: object, initial: object, held: Iterable[Item]
) -> WrongResult | None:
    """The error of an operator whose state no longer has the items that it holds, or None.

    `held`: items that the operator got and has not sent. They are lost if the state is None or
    equals the initial state.
    """
    item = next((item for item in held if must_be_answered(item)), None)
    if item is None or not (state is None or _is_same(state, initial)):
        return None
    return wrong_result(
        operator.on, f"`on` dropped a {type(item).__name__} from its state; {_LOST}"
    )


def _is_same(state: object, initial: object) -> bool:
    try:
        return bool(state == initial)
    except Exception:  # a user's state may not be comparable
        return False


def check_item(operator: Any, item: object) -> None:
    """Raise WrongResult if an object that an operator sends is no Item."""
    if type(item) not in ITEMS:
        cause = f"it sent {kind_of(item)}; a Request, TokenEvent, Prefilled or Answer was wanted"
        raise wrong_result(operator.on, cause)


def check_end(operator: Any, end: Terminate) -> None:
    """Raise WrongResult for a Terminate that would not end its request."""
    if not isinstance(end.event, TokenEvent):
        kind = kind_of(end.event)
        raise wrong_result(operator.on, f"its Terminate has {kind}; a TokenEvent was wanted")
    if not end.event.is_last:
        raise wrong_result(
            operator.on, "its Terminate has an event without a finish_reason; give one"
        )


def check_scale(operator: Any, output: ScaleEngine) -> None:
    """Raise WrongResult for a ScaleEngine to no replica, or to something that is no number."""
    count = output.num_replicas
    if type(count) is not int or count < 1:
        shown = count if type(count) is int else kind_of(count)
        raise wrong_result(
            operator.on, f"its ScaleEngine has {shown}; a number from 1 on was wanted"
        )


def unknown_output(operator: Any, output: object) -> WrongResult:
    wanted = ", ".join(kind.__name__ for kind in OperatorOutput.__args__)
    return wrong_result(operator.on, f"{kind_of(output)} is no output; known are {wanted}")


def unknown_outlet(operator: Any, outlet: str, known: Iterable[str]) -> WrongResult:
    cause = f"its outlet {outlet!r} leads nowhere; connected are {', '.join(known) or 'none'}"
    return wrong_result(getattr(operator, "on", None), cause)


def not_answered(service: Any, item: Item) -> WrongResult:
    """The error of a service operator whose `on_item` returned without sending anything.

    Only for operators with `holds` False: others may send later.
    """
    kind = type(item).__name__
    return wrong_result(service.on_item, f"`on_item` took a {kind} and sent nothing; {_LOST}")


def wrong_result(code: Any, message: str) -> WrongResult:
    return WrongResult(message, place_of_code(code) if code is not None else None)


SendItem: TypeAlias = Callable[[str, Item, str, float], None]
OutputHandler: TypeAlias = Callable[[LogicCell, Any, float, SendItem], None]


class ItemSender(Protocol):
    """Sends items of an operator along its edges. Both methods raise NoCredit and OperatorFault."""

    def propagate(self, node: str, item: Item, outlet: str, now: float) -> None: ...
    def propagate_batch(
        self, node: str, items: Sequence[Item], outlet: str, now: float
    ) -> None: ...


class Outputs:
    """The handlers of outputs, by the type of the output, in `by_type`.

    A handler is called with (cell, output, now, send); `send` sends an emitted item.
    """

    def __init__(
        self,
        propagation: ItemSender,
        gates: Gates,
        journal: Journal,
        refusals: RefusalCache,
        holds: Holds,
    ) -> None:
        self._propagation = propagation
        self._gates = gates
        self._journal = journal
        self._refusals = refusals
        self._holds = holds
        self.by_type: dict[type, OutputHandler] = {
            Emit: self._emit,
            EmitAll: self._emit_all,
            EmitFirst: self._emit_first,
            Wait: self._wait,
            Offer: self._offer,
            Terminate: self._terminate,
            Announce: self._announce,
            Report: self._report,
            ScaleEngine: self._scale,
        }

    def _emit(self, cell: LogicCell, output: Emit, now: float, send: SendItem) -> None:
        check_item(cell.operator, output.item)
        send(cell.name, output.item, output.outlet, now)

    def _emit_all(self, cell: LogicCell, output: EmitAll, now: float, send: SendItem) -> None:
        self._propagation.propagate_batch(cell.name, output.items, output.outlet, now)

    def _emit_first(self, cell: LogicCell, output: EmitFirst, now: float, send: SendItem) -> None:
        """Send an item on its first placement that has credit.

        Raises NoCredit if none has credit, and while the input waits for its first placement.
        """
        refused: NoCredit | None = None
        mark, choices = self._journal.mark(), iter(output.choices)
        while (chosen := _next(cell, choices)) is not None:
            item, state = chosen
            try:
                self._propagation.propagate(cell.name, item, output.outlet, now)
                cell.state = state
                return
            except NoCredit as error:
                self._journal.roll_back(mark)
                # Only the first placement may hold the input back.
                if refused is None and output.hold_s and error.replica is not None:
                    gate = CreditGate(error.node, error.replica)
                    if self._holds.holds(cell.name, item, gate, output.hold_s, now):
                        raise
                refused = refused or error
                if not self._gates.may_take(error.node, item):
                    break  # no replica has credit, so no other placement can succeed
        if refused is None:
            raise WrongResult("an EmitFirst has no item; give one at least")
        raise NoCredit(refused.node, None)

    def _wait(self, cell: LogicCell, output: Wait, now: float, send: SendItem) -> None:
        raise NoCredit(output.node, None)

    def _offer(self, cell: LogicCell, output: Offer, now: float, send: SendItem) -> None:
        """Send the first offered item that has credit.

        If an operator downstream fails on an item, the item leaves its queue and ends as failed. If
        it stayed, each later offer would fail on it again.
        """
        mark = self._journal.mark()
        for item in self._refusals.worth_trying(cell.name, output.items):
            try:
                self._propagation.propagate(cell.name, _dispatched(item, now), output.outlet, now)
            except NoCredit as error:
                self._journal.roll_back(mark)
                self._refusals.remember(item, error.node)
                continue
            except OperatorFault as fault:
                self._journal.roll_back(mark)
                self._journal.end(item, fault, now)
            self._journal.accepted.append((cell, item))
            return

    def _terminate(self, cell: LogicCell, output: Terminate, now: float, send: SendItem) -> None:
        check_end(cell.operator, output)
        self._journal.counts.append((cell.meter.ended, 1))
        if output.event.finish_reason == "failed":
            self._journal.counts.append((cell.meter.errors, 1))
        fault = OperatorFault(cell.name, output.cause) if output.cause is not None else None
        self._journal.outcomes.append(ReachedSink(output.event, terminal=True, fault=fault))

    def _announce(self, cell: LogicCell, output: Announce, now: float, send: SendItem) -> None:
        self._journal.outcomes.append(ReachedSink(output.forked))

    def _report(self, cell: LogicCell, output: Report, now: float, send: SendItem) -> None:
        self._journal.outcomes.append(UpstreamFeedback(cell.name, output.feedback))

    def _scale(self, cell: LogicCell, output: ScaleEngine, now: float, send: SendItem) -> None:
        check_scale(cell.operator, output)
        self._journal.outcomes.append(
            ScaleTo(output.engine, output.num_replicas, output.num_before, output.reason)
        )


def _next(cell: LogicCell, choices: Iterator[tuple[Item, Any]]) -> tuple[Item, Any] | None:
    """The next placement. The operator computes it now, so its exceptions are operator faults."""
    try:
        return next(choices, None)
    except (Exception, *LEAVING) as error:
        cell.meter.errors.count += 1
        raise OperatorFault(cell.name, as_error(error)) from error


def _dispatched(item: Item, now: float) -> Item:
    """The item; a request gets the stamp `dispatched_s`, as it leaves its queue."""
    if not isinstance(item, Request):
        return item
    return replace(item, stamps=replace(item.stamps, dispatched_s=now))
