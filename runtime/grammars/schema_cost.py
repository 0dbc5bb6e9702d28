"""What a JSON schema may cost to compile where llguidance has no limit, estimated from its text."""

from collections.abc import Callable, Mapping
from fractions import Fraction
from math import lcm
from typing import Any

from sagellm.runtime.grammars import GrammarError
from sagellm.runtime.grammars.regex_cost import check_regex_cost, regex_cost

MAX_PROPERTIES = 1000  # of one object: llguidance takes time quadratic in their number
# llguidance builds a state for each remainder, without a limit of its own.
MAX_MULTIPLE = 10_000
MAX_PAIRS = 5000  # of patterns of one object, each of which must exclude the others
MAX_US = 200_000  # for all parts below
# Measured on a server CPU from 2023.
_BOUND_DIGIT_US = 7  # of `minimum` and the like
_COMPOUND_US = 60  # an array or an object in `enum` or `const`
_MATCHED_US = 80  # a value of `enum` that must also match a pattern or a format
_FORMAT_US = {"uri": 470}
_OTHER_FORMAT_US = 100


class SchemaCost:
    """What the keywords of one schema cost together.

    Each method counts the value of a keyword of a node. Raises GrammarError.
    """

    def __init__(self) -> None:
        self._regexes, self._pairs, self._us, self._multiple = 0, 0, 0, 1

    def properties(self, value: object, node: dict[str, Any]) -> None:
        if isinstance(value, dict) and len(value) > MAX_PROPERTIES:
            raise GrammarError(f"properties: an object has more than {MAX_PROPERTIES}")

    def pattern(self, value: object, node: dict[str, Any]) -> None:
        if isinstance(value, str):
            self._regexes += regex_cost(value)
            check_regex_cost(self._regexes)

    def patterns(self, value: object, node: dict[str, Any]) -> None:
        if not isinstance(value, dict):
            return
        for regex in value:
            self.pattern(regex, node)
        self._pairs += len(value) * (len(value) - 1) // 2
        if self._pairs > MAX_PAIRS:
            raise GrammarError("patternProperties: too many; one object may have 100")

    def multiple(self, value: object, node: dict[str, Any]) -> None:
        self._multiple = lcm(self._multiple, _digits(value))
        if self._multiple > MAX_MULTIPLE:
            cause = f"the values, without zeros, have a common multiple above {MAX_MULTIPLE}"
            raise GrammarError(f"multipleOf: {cause}")

    def values(self, value: object, node: dict[str, Any]) -> None:
        if isinstance(value, list) and ("pattern" in node or "format" in node):
            self._spend(_MATCHED_US * len(value))
        waiting, num_compound = [value], -1  # the list of `enum` itself is none
        while waiting:
            part = waiting.pop()
            if isinstance(part, list | dict):
                num_compound += 1
                waiting += part if isinstance(part, list) else part.values()
        self._spend(_COMPOUND_US * max(0, num_compound))

    def bound(self, value: object, node: dict[str, Any]) -> None:
        self._spend(_BOUND_DIGIT_US * len(repr(value)))

    def format(self, value: object, node: dict[str, Any]) -> None:
        us = _FORMAT_US.get(value, _OTHER_FORMAT_US) if isinstance(value, str) else 0
        self._spend(us)

    def _spend(self, us: int) -> None:
        self._us += us
        if self._us > MAX_US:
            raise GrammarError(
                "the schema takes too long to compile: it has too many formats, bounds of numbers,"
                " or values that are compound or must match a pattern"
            )


COUNTED: Mapping[str, Callable[[SchemaCost, object, dict[str, Any]], None]] = {
    "properties": SchemaCost.properties,
    "pattern": SchemaCost.pattern,
    "patternProperties": SchemaCost.patterns,
    "multipleOf": SchemaCost.multiple,
    "enum": SchemaCost.values,
    "const": SchemaCost.values,
    "minimum": SchemaCost.bound,
    "maximum": SchemaCost.bound,
    "exclusiveMinimum": SchemaCost.bound,
    "exclusiveMaximum": SchemaCost.bound,
    "format": SchemaCost.format,
}


def _digits(multiple: object) -> int:
    """The digits of a value of `multipleOf`: 5 for 0.05 and 500. llguidance judges the type."""
    if isinstance(multiple, bool) or not isinstance(multiple, int | float):
        return 1
    try:
        digits = Fraction(repr(multiple))
    except ValueError:  # infinite
        return 1
    while digits.denominator > 1:
        digits *= 10
    number = abs(digits.numerator) or 1
    while number % 10 == 0:
        number //= 10
    return number
