"""Options: from the plain values of a graph to an operator's frozen dataclass."""

from collections.abc import Mapping
from dataclasses import fields
from typing import Any, TypeVar

import msgspec

from sagellm.graphs.ir import FrozenMap, Value, thaw

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
