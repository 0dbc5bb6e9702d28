"""Whether a plain value is of an annotated type, and how to say that type in words."""

from collections.abc import Mapping
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

from sagellm.graphs.diagnostics import shortened
from sagellm.graphs.ir import FrozenMap, Value

_WORDS = {
    bool: "true or false",
    int: "an integer",
    float: "a number",
    str: "a text",
    NoneType: "null",
    tuple: "a list",
}


def accepts(hint: Any, value: Value) -> bool:
    """True where `value` is of type `hint`: an int is a float too, a bool is no int."""
    origin, parts = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return any(accepts(part, value) for part in parts)
    if origin is Literal:
        return any(value == part and type(value) is type(part) for part in parts)
    if origin is tuple:
        return isinstance(value, tuple) and _items_accept(parts, value)
    if _is_mapping(hint):
        part = parts[1] if len(parts) == 2 else Any
        return isinstance(value, FrozenMap) and all(accepts(part, v) for v in value.values())
    return _plain_accepts(hint, value)


def _items_accept(parts: tuple[Any, ...], values: tuple[Value, ...]) -> bool:
    if len(parts) == 2 and parts[1] is Ellipsis:
        return all(accepts(parts[0], value) for value in values)
    pairs = zip(parts, values, strict=False)
    return len(parts) == len(values) and all(accepts(part, value) for part, value in pairs)


def _plain_accepts(hint: Any, value: Value) -> bool:
    if hint in (Any, object):
        return True
    if hint is None or hint is NoneType:
        return value is None
    if isinstance(value, bool):
        return hint is bool
    if hint is float:
        return isinstance(value, int | float)
    return isinstance(hint, type) and isinstance(value, hint)


def _is_mapping(hint: Any) -> bool:
    kind = get_origin(hint) or hint
    return isinstance(kind, type) and issubclass(kind, Mapping)


def choices(hint: Any) -> tuple[str, ...]:
    """The texts that a type with Literals allows; none where it allows other things too."""
    origin, parts = get_origin(hint), get_args(hint)
    if origin is Literal:
        return tuple(map(str, parts))
    if origin in (Union, UnionType):
        return tuple(name for part in parts for name in choices(part))
    return ()


def described(hint: Any) -> str:
    """A type in words: "an integer or null"."""
    origin, parts = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return " or ".join(described(part) for part in parts)
    if origin is Literal:
        return ("" if len(parts) == 1 else "one of ") + ", ".join(map(shown, parts))
    if origin is tuple and parts:
        return f"a list of items, each {described(parts[0])}"
    if _is_mapping(hint):
        return "a mapping"
    return _WORDS.get(NoneType if hint is None else hint, "a value")


def shown(value: object) -> str:
    """A value as YAML would say it."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return "a list"
    return "a mapping" if isinstance(value, Mapping) else f"`{shortened(str(value))}`"
