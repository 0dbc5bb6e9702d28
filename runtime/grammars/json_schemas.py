"""JSON schemas: what is checked and changed before llguidance compiles one."""

import json
from collections.abc import Mapping
from typing import Any

from sagellm.runtime.grammars import GrammarError
from sagellm.runtime.grammars.compile_cost import COUNTED, SchemaCost, check_regex_cost, regex_cost
from sagellm.runtime.grammars.one_of import Disjointness
from sagellm.runtime.grammars.schema_walk import objects, schemas_in

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
