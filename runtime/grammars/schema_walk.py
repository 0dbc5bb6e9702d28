"""The schemas in a JSON schema, and the names of their places in errors."""

import re
from collections.abc import Iterator
from typing import Any, NamedTuple, TypeAlias

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
