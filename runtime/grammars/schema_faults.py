"""The place in a JSON schema of a fault that llguidance found without saying where."""

import re
from collections.abc import Callable, Mapping
from itertools import islice
from typing import Any, TypeAlias

from sagellm.runtime.grammars import GrammarError
from sagellm.runtime.grammars.json_schemas import (
    DEFAULTS,
    UNKNOWN_FORMATS,
    disjointness_of,
    read_schema,
)
from sagellm.runtime.grammars.one_of import TYPES
from sagellm.runtime.grammars.references import References
from sagellm.runtime.grammars.schema_walk import schemas_in

_KEYWORD = re.compile(r"[$\w]+")
_BOUNDS = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum")


def fault_place(text: str, cause: str) -> str:
    """Where the fault is, for a message, or "" if it may be at several places.

    `text`: a schema that was read and refused. `cause`: the reason that the client is told.
    """
    schema = read_schema(text)
    for begin, (keywords, test) in _FAULTS.items():
        if cause.startswith(begin):
            named = keywords or tuple(_KEYWORD.findall(cause.removeprefix(begin)))
            places = _places(schema, named, test)
            return places[0] if len(places) == 1 or (places and test) else ""
    return ""


def _places(schema: dict[str, Any], keywords: tuple[str, ...], test: "_Test | None") -> list[str]:
    """The first two places of some keywords whose values do not pass a test."""
    known = _Schema(schema)
    found = (
        f" (at {place.shown(keyword)})"
        for place in schemas_in(schema)
        for keyword in keywords
        if keyword in place.schema
        and (keyword not in DEFAULTS or place.schema[keyword] != DEFAULTS[keyword])
        and (test is None or not test(known, place.schema[keyword]))
    )
    return list(islice(found, 2))


class _Schema:
    """A schema, and what is known of it as a whole. The tests of all its keywords share limits."""

    def __init__(self, schema: dict[str, Any]) -> None:
        self._references = References(schema)
        self._disjointness = disjointness_of(schema)

    def is_supported(self, value: object) -> bool:
        return False

    def is_type(self, value: object) -> bool:
        names = value if isinstance(value, list) else [value]
        return all(name in (*TYPES, "integer") for name in names)

    def is_known_format(self, value: object) -> bool:
        return not isinstance(value, str) or value not in UNKNOWN_FORMATS

    def are_disjoint(self, value: object) -> bool:
        return self._disjointness.holds(value)

    def is_local(self, value: object) -> bool:
        return not isinstance(value, str) or value.startswith("#")

    def has_target(self, value: object) -> bool:
        if not isinstance(value, str):
            return True
        try:
            return any(target is not None for target in self._references.targets(value))
        except GrammarError:  # the schema has too many references
            return True

    def is_positive(self, value: object) -> bool:
        return not isinstance(value, int | float) or value > 0


_Test: TypeAlias = Callable[[_Schema, object], bool]
# The beginning of a reason -> the keywords that may be the cause (none: those that follow in the
# reason), and what their values must pass. Without a test, the place is clear only if it is alone.
_FAULTS: Mapping[str, tuple[tuple[str, ...], _Test | None]] = {
    "the schema has keywords that are not supported: ": ((), _Schema.is_supported),
    "the schema has a format": (("format",), _Schema.is_known_format),
    "the schema has a type": (("type",), _Schema.is_type),
    "the schema has a value of a wrong type: ": ((), None),
    "oneOf: ": (("oneOf",), _Schema.are_disjoint),
    "$ref: only": (("$ref",), _Schema.is_local),
    "$ref: the schema has nothing": (("$ref",), _Schema.has_target),
    "multipleOf: the number is not above 0": (("multipleOf",), _Schema.is_positive),
    "multipleOf: ": (("multipleOf",), None),
    "patternProperties: ": (("patternProperties",), None),
    "minProperties and maxProperties": (("minProperties", "maxProperties"), None),
    "minimum and maximum: ": (_BOUNDS, None),
    "a regular expression": (("pattern", "patternProperties"), None),
    "regular expressions": (("pattern", "patternProperties"), None),
}
