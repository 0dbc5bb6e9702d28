"""Arguments that stand between tags: strings as they are, other values as JSON.

The schema of the tool says which arguments are strings.
"""

import json
import re
from dataclasses import dataclass
from typing import Any

from sagellm.chat_formats.chat_format import SpecialTokens, ToolSpec
from sagellm.chat_formats.json_call import PYTHON_SCALARS, json_text
from sagellm.chat_formats.lark_rules import (
    Rules,
    bounded_text_up_to,
    inline_json,
    literal,
    marker,
    text_up_to,
)
from sagellm.chat_formats.text_source import MarkerFinder, TextReading, TextSource, Write
from sagellm.chat_formats.tool_schema import (
    ToolSchema,
    check_bound,
    constants,
    definitions,
    length_bounds,
    member_schema,
    schema_of,
    type_of,
    types_of,
)

UNWRITABLE = re.compile(r"[<>\n]|^\s|\s$")  # in the names of arguments
_STRING = frozenset({"type", "enum", "const", "minLength", "maxLength", "anyOf", "oneOf"})


def read_tagged_value(
    source: TextSource, write: Write, tool: ToolSpec, name: str, *, closing: str, newline: str = ""
) -> TextReading[None]:
    """Read the value of an argument after its tag, and write it as JSON.

    `closing`: the tag after the value. `newline`: what belongs to the tags at both ends of a value.
    """
    yield from source.accept(newline)
    schema = schema_of(tool)
    found = member_schema(schema, name, schema)
    types = frozenset({"string"}) if found is None else types_of(found, schema)
    finder = MarkerFinder((closing,))
    if types == {"string"}:
        write('"')
        text = _WithoutEnd(lambda piece: write(json_text(piece)[1:-1]), newline)
        if (yield from source.until(finder, text.write)):
            write('"')
        return
    pieces: list[str] = []
    if (yield from source.until(finder, pieces.append)):
        write(_json_of("".join(pieces).removesuffix(newline), types))


class _WithoutEnd:
    """Writes text without the text at its end, which is one character or none."""

    def __init__(self, write: Write, end: str) -> None:
        self._write = write
        self._end = end
        self._held = ""

    def write(self, text: str) -> None:
        text = self._held + text
        kept = text.removesuffix(self._end)
        self._held = text[len(kept) :]
        if kept:
            self._write(kept)


def _json_of(text: str, types: frozenset[str]) -> str:
    """The JSON text of an argument: the text itself if it is JSON of such a type, else a string."""
    given = PYTHON_SCALARS.get(text.strip(), text.strip())  # as models write them by mistake
    try:
        value = json.loads(given, parse_constant=_no_json)
    except (ValueError, RecursionError):
        return json_text(text)
    return given if type_of(value) in types else json_text(text)


def _no_json(constant: str) -> Any:
    """Refuse NaN and Infinity, which Python reads and JSON does not have."""
    raise ValueError(constant)


@dataclass(frozen=True, slots=True, kw_only=True)
class ValueRules:
    """Adds the rules of values to `rules`.

    After a value come the text `end` and the tag `closing`.
    """

    rules: Rules
    closing: str
    end: str = ""
    special_tokens: SpecialTokens

    def add(self, tool: ToolSpec, schema: ToolSchema) -> str:
        """Add the rule of a value and its tag, and return its name. Raises UnboundSchema."""
        name = self.rules.new_name()
        self.rules.append(self._rule(name, tool, schema))
        return name

    def _rule(self, name: str, tool: ToolSpec, schema: ToolSchema) -> str:
        root = schema_of(tool)
        closing = marker(self.closing, self.special_tokens)
        if "string" not in types_of(schema, root):
            value = inline_json({**definitions(root), **schema}, is_strict=tool.strict)
            return f"{name}: {value} {literal(self.end)} {closing}"
        check_bound(tool, schema, _STRING)
        texts = constants(schema)
        if texts is not None:
            shown = (text if isinstance(text, str) else json.dumps(text) for text in texts)
            return (
                f"{name}: {' | '.join(f'{literal(text + self.end)} {closing}' for text in shown)}"
            )
        bounds = length_bounds(schema)
        if bounds is None:
            return text_up_to(name, self.closing, self.special_tokens)
        return bounded_text_up_to(name, self.closing, self.special_tokens, bounds, self.end)
