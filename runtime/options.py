"""Options: from the plain values of a graph to an operator's frozen dataclass."""

from collections.abc import Mapping
from dataclasses import fields
from typing import Any, TypeVar

import msgspec

from sagellm.graphs.diagnostics import Diagnostic, GraphError, Path
from sagellm.graphs.facts import Facts
from sagellm.graphs.ir import FrozenMap, Value, freeze, thaw
from sagellm.graphs.rules.options import check_options

T = TypeVar("T")


class OptionError(ValueError):
    """An option has a value that its type does not admit."""


def read_options(options: type[T], attrs: FrozenMap | Mapping[str, Value]) -> T:
    """Build `options` (a dataclass) from values already checked. Raises OptionError."""
    known = {option.name for option in fields(options)}  # type: ignore[arg-type]
    plain: dict[str, Any] = {name: thaw(value) for name, value in attrs.items() if name in known}
    unknown = sorted(set(attrs) - known - {"engine"})
    if unknown:
        raise OptionError(f"{options.__name__} has no option {unknown[0]!r}")
    try:
        return msgspec.convert(plain, options)
    except msgspec.ValidationError as error:
        raise OptionError(str(error)) from error


def read_own_options(made: type[T], given: Mapping[str, Any], path: Path) -> T:
    """A dataclass of the values that stand at `path` of a graph, where nothing has checked them.
    Raises GraphError with all that is wrong.
    """
    values = freeze(dict(given))
    assert isinstance(values, FrozenMap)
    mistakes = tuple(check_options(path, values, made, Facts()))
    if mistakes:
        raise GraphError(mistakes)
    return read_options(made, values)


def refuse_options(what: str, given: Mapping[str, Any], path: Path) -> None:
    """Raises GraphError where there are values at `path` for what has no options."""
    if given:
        message = f"{what} has no options of its own"
        raise GraphError((Diagnostic("unknown-option", path, message, "leave them out"),))
