"""The answer to a client whose grammar is refused: the reason, and the place of a schema's fault.

The messages of llguidance quote the grammar, so each is replaced by a text of our own.
"""

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
    schemas_in,
)
from sagellm.runtime.grammars.one_of import TYPES
from sagellm.runtime.grammars.references import References

MAX_NAMES = 8
_KEYWORD = re.compile(
    r"""
    (?<![\w$])(?:
        \$(?:defs|ref|dynamicAnchor|dynamicRef|recursiveAnchor|recursiveRef) | additionalItems
      | additionalProperties | allOf | anyOf | const | contains | definitions | dependencies
      | dependentRequired | dependentSchemas | else | enum | exclusiveMaximum | exclusiveMinimum
      | format | if | items | maxContains | maxItems | maxLength | maxProperties | maximum
      | minContains | minItems | minLength | minProperties | minimum | multipleOf | not | oneOf
      | patternProperties | pattern | prefixItems | propertyNames | properties | required | then
      | type | unevaluatedItems | unevaluatedProperties | uniqueItems
    )(?!\w)
    """,
    re.VERBOSE,
)
_PLACE = re.compile(r"(?:at )?(\d{1,7})\((\d{1,7})\):")

# A part of a message of llguidance 1.9 -> the reason. {names}: the JSON schema keywords after it.
# The first that is found counts.
_REASONS: tuple[tuple[str, str], ...] = (
    ("Unimplemented keys: ", "the schema has keywords that are not supported: {names}"),
    ("Unknown format: ", "the schema has a format that is not supported"),
    ("Invalid type: ", "the schema has a type that JSON does not have"),
    ("is not present in a registry", "$ref: only references into the schema itself are followed"),
    ("Pointer '", "$ref: the schema has nothing at its target"),
    ("Anchor '", "$ref: the schema has nothing at its target"),
    ("circular references", "$ref: a circular reference beside other keywords is not supported"),
    ("oneOf constraints", "oneOf: options that a value could match together are not supported; give"
     " each a required property with a const of its own, or use anyOf"),
    ("Unsatisfiable schema", "no text can satisfy the schema"),
    ("not disjoint", "patternProperties: a name may match only one of the patterns"),
    ("are disjoint", "patternProperties: a name may match only one of the patterns"),
    ("min/maxProperties only", "minProperties and maxProperties are supported only if all"
     " properties are required"),
    ("float range", "minimum and maximum: the numbers are too large or have too many digits"),
    ("integer range", "minimum and maximum: the numbers are too large or have too many digits"),
    ("too many digits", "multipleOf: the number has too many digits"),
    ("invalid multiple of", "multipleOf: the number is not above 0"),
    ("recursion limit exceeded", "the schema is nested too deeply"),
    ("stack level exceeded", "the schema combines schemas too deeply"),
    ("nested too deeply", "the grammar is nested too deeply"),
    ("number of nested", "a regular expression is nested too deeply"),
    ("look-around", "a regular expression has a look-ahead or look-behind: these are not"
     " supported"),
    ("lookarounds not supported", "a regular expression has an anchor or a word boundary inside:"
     " these are not supported"),
    ("backreferences", "a regular expression has a back-reference: these are not supported"),
    ("regex parse error", "a regular expression is not valid"),
    ("invalid regex", "a regular expression is not valid"),
    ("too large", "the grammar is too large"),
    ("too big", "the grammar is too large"),
    ("max is", "the grammar allows too many alternatives at one place"),
    ("Too many items", "the grammar allows too many alternatives at one place"),
    ("too many states", "the grammar is too complex"),
    ("too many expressions", "the grammar is too complex"),
    ("fuel", "the grammar is too complex"),
    ("precomputation", "the grammar is too complex"),
    ("NoExtension", "no text that the model can write belongs to the grammar"),
    ("Expected ", "the schema has a value of a wrong type: {names}"),
    ("must be a", "the schema has a value of a wrong type: {names}"),
    ("unknown special token", "the model has no special token of that name"),
    ("Token range end", "the model has no token of that number"),
    ("unknown name", "a name is not defined"),
    ("unknown grammar", "a name is not defined"),
    ("no start rule", "there is no rule named start"),
    ("circular reference", "a terminal refers to itself"),
    ("duplicate", "a name is defined twice"),
    ("Unknown common regex", "an imported name is not known"),
    ("Unable to determine", "regular expressions that must hold together are too complex"),
    ("hex escape", "the schema is not Unicode text"),
    ("surrogate", "the schema is not Unicode text"),
    ("parametric", "a rule needs parameters that it does not have"),
    ("not supported", "a construct is not supported"),
    ("lexer error", "the syntax is not valid"),
    ("Empty grammar", "the grammar is empty"),
)  # fmt: skip
_OTHER = "the grammar is not valid"
_NAMED = re.compile(r"[$\w]+")
_BOUNDS = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum")


def reason(message: str, *, has_lines: bool = False) -> str:
    """Return the reason that a client is told for a message of llguidance.

    `has_lines`: llguidance was given the client's own lines, so that their numbers are of use.
    """
    place = _PLACE.match(message)
    where = f" (line {place[1]}, column {place[2]})" if place and has_lines else ""
    return f"{_cause(message, is_syntax=bool(place))}{where}"


def _cause(message: str, *, is_syntax: bool) -> str:
    if is_syntax and "Expected" in message:
        return "the syntax is not valid"
    names = _keywords(message)
    for part, text in _REASONS:
        if part in message and (names or "{names}" not in text):
            return text.format(names=", ".join(names))
    return _OTHER


def _keywords(message: str) -> list[str]:
    """The JSON schema keywords in a message, each once; none of the value that it quotes."""
    found = _KEYWORD.findall(message.partition(", got ")[0][:1000])
    return list(dict.fromkeys(found))[:MAX_NAMES]


def fault_place(text: str, cause: str) -> str:
    """The place of the fault, for a message, or "" if it may be at several places.

    `text`: a schema that was read and refused. `cause`: the reason that the client is told.
    """
    schema = read_schema(text)
    for begin, (keywords, test) in _FAULTS.items():
        if cause.startswith(begin):
            named = keywords or tuple(_NAMED.findall(cause.removeprefix(begin)))
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
