"""Limits of what schemas and regular expressions may cost to compile where llguidance has no limit.

The cost is estimated from the text alone. Optional parts of a regular expression take time and
memory that grow with the square of their number in a row: 2,000 parts like `.?` take 0.3 s, and
20,000 take gigabytes. Other parts cost little.
"""

import re
from collections.abc import Callable, Mapping
from fractions import Fraction
from math import lcm
from typing import Any

from sagellm.runtime.grammars import GrammarError

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
MAX_IN_A_ROW = 1000  # optional parts of a regular expression
MAX_COST = MAX_IN_A_ROW**2
# Every repetition is bounded, or cannot fail late: the text may be hostile to this expression, too.
_PART = re.compile(
    r"""
      \\(?:[pPxuU]\{[^}]{0,100}\}|.)                             # an escape
    | \[\^?\]?(?>\\.|\[:[a-z^]{0,12}:\]|[^\\\]])*+\]              # a class
    | (?P<open>\((?:\?(?:P?<[^<>]{0,100}>|[a-zA-Z-]{0,10}:?))?)  # a group, with a name or flags
    | (?P<next>\|)
    | (?P<close>\))
    | (?P<plain>[^\\\[()|]+)
    | (?P<stray>.)
    """,
    re.VERBOSE | re.DOTALL,
)
_OPTIONAL = re.compile(r"[?*]|\{\s*0*\s*,")


class SchemaCost:
    """The cost of all keywords of one schema.

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


def num_optional(text: str) -> int:
    """The quantifiers in a text that allow nothing: `?`, `*`, and `{0,3}`."""
    return sum(1 for _ in _OPTIONAL.finditer(text))


def regex_cost(regex: str) -> int:
    """The sum of the squares of the numbers of optional parts, over all alternatives. The number of
    a group is that of its worst alternative. Raises GrammarError if a class has no end.
    """
    cost, current, worst = 0, 0, 0
    outer: list[tuple[int, int]] = []
    for found in _PART.finditer(regex):
        if found["open"]:
            outer.append((current, worst))
            current, worst = 0, 0
        elif found["next"] or (found["close"] and outer):
            cost += current**2
            current, worst = 0, max(worst, current)
            if found["close"]:
                before, worst_before = outer.pop()
                current, worst = before + worst, worst_before
        elif found["plain"]:
            current += num_optional(found[0])
        elif found["stray"]:
            raise GrammarError("a regular expression is not valid")
    return cost + sum((before + current) ** 2 for before, _ in outer) + current**2


def check_regex_cost(cost: int) -> None:
    """Raise GrammarError if regular expressions of this cost in all are too expensive."""
    if cost > MAX_COST:
        cause = f"regular expressions with more than {MAX_IN_A_ROW} optional parts in a row"
        raise GrammarError(f"the grammar has {cause}, or many with nearly as many")
