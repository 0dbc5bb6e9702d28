"""What an operator may answer: checked, so that a wrong answer is an error and no lost request."""

import math
from collections.abc import Iterable
from typing import Any

from sagellm.runtime.messages import Answer, Item, Prefilled, Request, TokenEvent
from sagellm.runtime.operator import Arrival, Input, Output, Step, Terminate
from sagellm.runtime.user_code import WrongResult, kind_of, place_of_code

ITEMS = frozenset({TokenEvent, Request, Prefilled, Answer})
_LOST = "its request would never end: emit or terminate it"


def must_be_answered(item: Item) -> bool:
    """Whether a request hangs where an operator drops this item. Tokens may be left out."""
    return not isinstance(item, TokenEvent) or item.is_last


def check_step(operator: Any, happened: Input, step: object, before: object) -> None:
    """Raise WrongResult for what is no Step, and for one that loses an item.

    An item is lost where the operator sends nothing, keeps its state and asks for no wake-up.
    """
    if not isinstance(step, Step):
        raise wrong(operator.on, f"`on` returned {kind_of(step)}; a Step was wanted")
    if not isinstance(step.outputs, tuple):
        kind = kind_of(step.outputs)
        raise wrong(operator.on, f"the outputs of its Step are {kind}; a tuple was wanted")
    if step.wake_at is not None and not _is_time(step.wake_at):
        kind = kind_of(step.wake_at)
        raise wrong(operator.on, f"the wake_at of its Step is {kind}; a finite number was wanted")
    if step.outputs or step.state is not before or step.wake_at is not None:
        return
    if isinstance(happened, Arrival) and must_be_answered(happened.item):
        kind = type(happened.item).__name__
        raise wrong(operator.on, f"`on` took a {kind}, kept nothing and sent nothing; {_LOST}")


def _is_time(value: object) -> bool:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return is_number and -math.inf < value < math.inf  # type: ignore[operator]


def state_was_lost(
    operator: Any, state: object, initial: object, held: Iterable[Item]
) -> WrongResult | None:
    """The error of an operator that was given items, has sent none of them, waits for nothing, and
    has the state of one that was given none.
    """
    item = next((item for item in held if must_be_answered(item)), None)
    if item is None or not (state is None or _is_same(state, initial)):
        return None
    return wrong(operator.on, f"`on` dropped a {type(item).__name__} from its state; {_LOST}")


def _is_same(state: object, initial: object) -> bool:
    try:
        return bool(state == initial)
    except Exception:  # a user's state need not compare
        return False


def check_item(operator: Any, item: object) -> None:
    """Raise WrongResult for what cannot travel."""
    if type(item) not in ITEMS:
        cause = f"it sent {kind_of(item)}; a Request, TokenEvent, Prefilled or Answer was wanted"
        raise wrong(operator.on, cause)


def check_end(operator: Any, end: Terminate) -> None:
    """Raise WrongResult where a Terminate would not end its request."""
    if not isinstance(end.event, TokenEvent):
        kind = kind_of(end.event)
        raise wrong(operator.on, f"its Terminate has {kind}; a TokenEvent was wanted")
    if not end.event.is_last:
        raise wrong(operator.on, "its Terminate has an event without a finish_reason; give one")


def unknown_output(operator: Any, output: object) -> WrongResult:
    wanted = ", ".join(kind.__name__ for kind in Output.__args__)
    return wrong(operator.on, f"{kind_of(output)} is no output; known are {wanted}")


def unknown_outlet(operator: Any, outlet: str, known: Iterable[str]) -> WrongResult:
    cause = f"its outlet {outlet!r} leads nowhere; connected are {', '.join(known) or 'none'}"
    return wrong(getattr(operator, "on", None), cause)


def not_answered(service: Any, item: Item) -> WrongResult:
    """For a service operator with `holds` False that has sent nothing for an item."""
    kind = type(item).__name__
    return wrong(service.on_item, f"`on_item` took a {kind} and sent nothing; {_LOST}")


def wrong(code: Any, message: str) -> WrongResult:
    return WrongResult(message, place_of_code(code) if code is not None else None)
