"""From plain values to a struct; what does not fit is a 400 that names the field and its range."""

import re
from typing import Any, TypeVar, get_args

import msgspec

from sagellm.gateway.errors import ApiError, wrong
from sagellm.gateway.protocol.conversation import Role, ToolChoice
from sagellm.gateway.protocol.request import Effort, Side

T = TypeVar("T")

_PLACE = re.compile(r" - at (?:`key` in )?`\$\.?(.*)`$", re.DOTALL)
_MISSING = re.compile(r"Object missing required field `(\w+)`")
_CHOICES = {
    "role": get_args(Role),
    "reasoning_effort": get_args(Effort),
    "truncation_side": get_args(Side),
    "type": ("text",),
    "tool_choice": get_args(ToolChoice),
}
_STEP = re.compile(r"\.?(\w+)|\[(\d+)\]")


def convert(plain: dict[str, Any], struct: type[T]) -> T:
    """Check every type and range. Raises ApiError (400), which quotes numbers but never text."""
    try:
        return msgspec.convert(plain, struct)
    except msgspec.ValidationError as error:
        fault = str(error)
    raise _refusal(fault, plain)


def _refusal(fault: str, plain: dict[str, Any]) -> ApiError:
    place = _PLACE.search(fault)
    param = place.group(1).removesuffix("[...]") if place else ""
    what = _PLACE.sub("", fault)
    missing = _MISSING.match(what)
    if missing:
        param = f"{param}.{missing.group(1)}".lstrip(".")
        return wrong(param, "is missing", "missing_required_parameter")
    if what.startswith("Invalid enum value"):  # goes on with the value, which is the client's text
        return wrong(param, f"must be one of {', '.join(_choices(param))}")
    return wrong(param, _number(param, plain) + what[:1].lower() + what[1:])


def _choices(param: str) -> tuple[str, ...]:
    leaf = param.rpartition(".")[2]
    return ("function",) if leaf == "type" and "tool" in param else _CHOICES[leaf]


def _number(param: str, plain: Any) -> str:
    """ "is 17; " where a number stands there."""
    for name, index in _STEP.findall(param):
        step = int(index) if index else name
        if isinstance(plain, dict | list) and _has(plain, step):
            plain = plain[step]
        else:
            return ""
    is_number = isinstance(plain, int | float) and not isinstance(plain, bool)
    return f"is {plain}; " if is_number else ""


def _has(plain: dict[str, Any] | list[Any], step: str | int) -> bool:
    if isinstance(plain, list):
        return isinstance(step, int) and step < len(plain)
    return step in plain
