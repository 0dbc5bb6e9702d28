"""JSON schemas: the schemas in one with their places, and what is checked and changed before
llguidance compiles one.
"""

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple, TypeAlias

from sagellm.runtime.grammars import GrammarError
from sagellm.runtime.grammars.compile_cost import COUNTED, SchemaCost, check_regex_cost, regex_cost
from sagellm.runtime.grammars.one_of import Disjointness

# Between the tokens of JSON: up to two blanks, and one line break with indentation. json.dumps and
# pretty-printers write no more; a model that likes blanks would write them for ever.
WHITESPACE = r"[ \t]{1,2}(\r?\n[ \t]{0,20})?|\r?\n[ \t]{0,20}"
OPTIONS: Mapping[str, object] = {"whitespace_pattern": WHITESPACE}  # others have their default
_OPTIONS_KEY = "x-guidance"
_REGEX_OPTIONS = ("whitespace_pattern", "item_separator", "key_separator")

# Keywords that llguidance does not know, and values that exclude nothing. zod writes the second.
DEFAULTS: Mapping[str, object] = {"uniqueItems": False, "propertyNames": {"type": "string"}}

# Formats of the standard that llguidance knows, and those that it does not. Names outside of the
# standard, such as `binary` of OpenAPI or `path` of pydantic, are annotations.
FORMATS = frozenset(
    {"date-time", "date", "time", "duration", "email", "hostname", "ipv4", "ipv6", "uuid", "uri"}
)
UNKNOWN_FORMATS = frozenset(
    {"idn-email", "idn-hostname", "uri-reference", "iri", "iri-reference", "uri-template",
     "json-pointer", "relative-json-pointer", "regex"}
)  # fmt: skip


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
    disjointness = disjointness_of(schema)
    for node in [place.schema for place in schemas_in(schema)]:
        if _is_annotation(node.get("format")):
            del node["format"]
        for key, default in DEFAULTS.items():
            if node.get(key) == default:
                del node[key]
        if "anyOf" not in node and disjointness.holds(node.get("oneOf")):
            renamed = [("anyOf" if key == "oneOf" else key, node[key]) for key in node]
            node.clear()
            node.update(renamed)  # in the order that they had: it is that of the properties
    return json.dumps({**schema, _OPTIONS_KEY: options})


def disjointness_of(schema: dict[str, Any]) -> Disjointness:
    """The judge of whether options of the schema exclude each other."""
    inner = [place.schema for place in schemas_in(schema)][1:]
    has_bases = any(isinstance(node.get(key), str) for node in inner for key in ("$id", "id"))
    return Disjointness({} if has_bases else schema)  # references would lead elsewhere


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
    cost = SchemaCost()
    for node in objects(schema):
        for keyword in [one for one in COUNTED if one in node]:
            try:
                COUNTED[keyword](cost, node[keyword], node)
            except GrammarError as error:
                raise GrammarError(f"{error}{_place(schema, node, keyword)}") from None


def _place(schema: dict[str, Any], node: dict[str, Any], keyword: str) -> str:
    """The place of a keyword of a part, for a message; "" if the part is data."""
    found = (place for place in schemas_in(schema) if place.schema is node)
    return next((f" (at {place.shown(keyword)})" for place in found), "")


def _is_annotation(name: object) -> bool:
    return isinstance(name, str) and name not in FORMATS | UNKNOWN_FORMATS


_ONE = ("additionalProperties", "items", "additionalItems", "contains", "not", "if", "then", "else",
        "propertyNames", "unevaluatedItems", "unevaluatedProperties")  # fmt: skip
_LISTS = ("anyOf", "oneOf", "allOf", "prefixItems", "items")
_MAPS = ("properties", "patternProperties", "dependentSchemas")
_DEFINITIONS = ("$defs", "definitions")
_PLAIN = re.compile(r"[A-Za-z0-9_-]{1,40}")
_MAX_PLACE_CHARS = 120


_Step: TypeAlias = tuple[str, str | int | None]  # a keyword, and a name or an index in its value
_Path: TypeAlias = tuple[Any, _Step] | None  # the path of the schema around it, and one step more


class SchemaPlace(NamedTuple):
    """A schema in a schema, and the path to it."""

    schema: dict[str, Any]
    path: _Path

    def shown(self, keyword: str) -> str:
        """The place of one of the keywords for messages, such as `$.properties.tags.items.not`.

        Names that are no plain words are shown as `*`. Of a long path, the end is shown.
        """
        steps, path = f".{keyword}", self.path
        while path is not None:
            path, step = path
            shown = _shown(step) + steps
            if len(shown) > _MAX_PLACE_CHARS:
                return f"$..{steps}"
            steps = shown
        return f"${steps}"


def schemas_in(schema: dict[str, Any]) -> Iterator[SchemaPlace]:
    """The schema itself, then all schemas in it. Data, as in `const` or `examples`, is none."""
    waiting: list[tuple[object, _Path]] = [(schema, None)]
    while waiting:
        node, path = waiting.pop()
        if isinstance(node, dict):
            inside = [(inner, (path, step)) for step, inner in subschemas_of(node)]
            waiting += reversed(inside)
            yield SchemaPlace(node, path)


def subschemas_of(
    node: dict[str, Any], *, with_definitions: bool = True
) -> Iterator[tuple[_Step, object]]:
    """The values directly in a schema that may be schemas, each with the step that leads to it.
    Only references lead to definitions.
    """
    for key in _ONE:
        if key in node:
            yield (key, None), node[key]
    for key in _LISTS:
        if isinstance(options := node.get(key), list):
            yield from (((key, index), option) for index, option in enumerate(options))
    for key in (*_MAPS, *_DEFINITIONS) if with_definitions else _MAPS:
        if isinstance(named := node.get(key), dict):
            yield from (((key, name), inner) for name, inner in named.items())


def objects(value: object) -> Iterator[dict[str, Any]]:
    """All JSON objects in a value."""
    waiting = [value]
    while waiting:
        part = waiting.pop()
        if isinstance(part, dict):
            waiting += part.values()
            yield part
        elif isinstance(part, list):
            waiting += part


def _shown(step: _Step) -> str:
    keyword, inner = step
    if isinstance(inner, int):
        return f".{keyword}[{inner}]"
    if inner is None:
        return f".{keyword}"
    return f".{keyword}.{inner if _PLAIN.fullmatch(inner) else '*'}"
