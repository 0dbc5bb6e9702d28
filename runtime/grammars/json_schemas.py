"""JSON schemas: what is checked and changed before llguidance compiles one."""

import json
from collections.abc import Iterator, Mapping
from fractions import Fraction
from math import lcm
from typing import Any

from sagellm.runtime.grammars import GrammarError
from sagellm.runtime.grammars.one_of import Disjointness
from sagellm.runtime.grammars.regex_cost import check_regex_cost, regex_cost

# Between the tokens of JSON: up to two blanks, and one line break with indentation. json.dumps and
# pretty-printers write no more; a model that likes blanks would write them for ever.
WHITESPACE = r"[ \t]{1,2}(\r?\n[ \t]{0,20})?|\r?\n[ \t]{0,20}"
OPTIONS: Mapping[str, object] = {"whitespace_pattern": WHITESPACE}  # others have their default
_OPTIONS_KEY = "x-guidance"
_REGEX_OPTIONS = ("whitespace_pattern", "item_separator", "key_separator")

# Keywords that llguidance does not know, and values that exclude nothing. zod writes the second.
_DEFAULTS: Mapping[str, object] = {"uniqueItems": False, "propertyNames": {"type": "string"}}

# Formats of the standard that llguidance knows, and those that it does not. Names outside of the
# standard, such as `binary` of OpenAPI or `path` of pydantic, are annotations.
FORMATS = frozenset(
    {"date-time", "date", "time", "duration", "email", "hostname", "ipv4", "ipv6", "uuid", "uri"}
)
UNKNOWN_FORMATS = frozenset(
    {"idn-email", "idn-hostname", "uri-reference", "iri", "iri-reference", "uri-template",
     "json-pointer", "relative-json-pointer", "regex"}
)  # fmt: skip

MAX_PROPERTIES = 1000  # of one object: llguidance takes time quadratic in their number
# llguidance builds a state for each remainder, without a limit of its own.
MAX_MULTIPLE = 10_000

_ONE = ("additionalProperties", "items", "additionalItems", "contains", "not", "if", "then", "else",
        "propertyNames", "unevaluatedItems", "unevaluatedProperties")  # fmt: skip
_LISTS = ("anyOf", "oneOf", "allOf", "prefixItems", "items")
_MAPS = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")


def read_schema(text: str) -> dict[str, Any]:
    """The JSON object in `text`. Raises GrammarError."""
    try:
        found = json.loads(text)
    except RecursionError:
        raise GrammarError("the schema is nested too deeply") from None
    except ValueError:
        raise GrammarError("the schema is not valid JSON") from None
    if not isinstance(found, dict):
        raise GrammarError("the schema is not a JSON object")
    return found


def schema_text(schema: dict[str, Any], options: Mapping[str, object] = OPTIONS) -> str:
    """The JSON text for llguidance. Changes `schema`. Raises GrammarError if it is too expensive.

    `options`: llguidance's options; those in the schema do not count. `oneOf` becomes `anyOf` where
    no value can match two options; llguidance itself looks into no references, and refuses the
    rest.
    """
    _check_cost(schema)
    nodes = list(_subschemas(schema))
    has_bases = any(isinstance(node.get(key), str) for node in nodes[1:] for key in ("$id", "id"))
    disjointness = Disjointness({} if has_bases else schema)  # references would lead elsewhere
    for node in nodes:
        if _is_annotation(node.get("format")):
            del node["format"]
        for key, default in _DEFAULTS.items():
            if node.get(key) == default:
                del node[key]
        if "anyOf" not in node and disjointness.holds(node.get("oneOf")):
            renamed = [("anyOf" if key == "oneOf" else key, node[key]) for key in node]
            node.clear()
            node.update(renamed)  # in the order that they had: it is that of the properties
    return json.dumps({**schema, _OPTIONS_KEY: options})


def own_options(schema: dict[str, Any]) -> Mapping[str, object]:
    """The options that a schema in a grammar names, else ours. Raises GrammarError."""
    options = schema.get(_OPTIONS_KEY, OPTIONS)
    if not isinstance(options, dict):
        raise GrammarError(f"{_OPTIONS_KEY} is not a JSON object")
    regexes = (options.get(name) for name in _REGEX_OPTIONS)
    check_regex_cost(sum(regex_cost(regex) for regex in regexes if isinstance(regex, str)))
    return options


def _check_cost(schema: dict[str, Any]) -> None:
    """Raise GrammarError if llguidance would take too long: it has no limit of its own here.

    A reference may make a schema of any part, so all parts are looked at.
    """
    cost, multiple = 0, 1
    for node in _objects(schema):
        properties = node.get("properties")
        if isinstance(properties, dict) and len(properties) > MAX_PROPERTIES:
            raise GrammarError(f"properties: an object has more than {MAX_PROPERTIES}")
        patterns = node.get("patternProperties")
        regexes = [node.get("pattern"), *(patterns if isinstance(patterns, dict) else ())]
        cost += sum(regex_cost(regex) for regex in regexes if isinstance(regex, str))
        multiple = lcm(multiple, _digits(node.get("multipleOf")))
        if multiple > MAX_MULTIPLE:
            cause = f"the values, without zeros, have a common multiple above {MAX_MULTIPLE}"
            raise GrammarError(f"multipleOf: {cause}")
    check_regex_cost(cost)


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


def _is_annotation(name: object) -> bool:
    return isinstance(name, str) and name not in FORMATS | UNKNOWN_FORMATS


def _objects(value: object) -> Iterator[dict[str, Any]]:
    """All JSON objects in a value."""
    waiting = [value]
    while waiting:
        part = waiting.pop()
        if isinstance(part, dict):
            waiting += part.values()
            yield part
        elif isinstance(part, list):
            waiting += part


def _subschemas(schema: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The schema itself, then all schemas in it. Data, as in `const` or `examples`, is none."""
    waiting: list[object] = [schema]
    while waiting:
        node = waiting.pop()
        if isinstance(node, dict):
            waiting += _children(node)
            yield node


def _children(node: dict[str, Any]) -> Iterator[object]:
    for key in _ONE:
        yield node.get(key)
    for key in _LISTS:
        if isinstance(options := node.get(key), list):
            yield from options
    for key in _MAPS:
        if isinstance(named := node.get(key), dict):
            yield from named.values()
