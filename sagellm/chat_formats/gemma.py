"""The formats of FunctionGemma and Gemma 4: calls in a notation of their own.

    <start_function_call>call:f{x:<escape>text<escape>,n:[1,true]}<end_function_call>
    <|tool_call>call:f{x:<|"|>text<|"|>,n:[1,true]}<tool_call|>

Names of members are bare, texts stand between quotes of their own, the rest is as in JSON. The
arguments are written as JSON. The template that ships with Gemma 3 knows no tools.

Source: the chat templates of google/functiongemma-270m-it and google/gemma-4-31B-it.
"""

import json
import re
from functools import partial
from typing import Any

from sagellm.chat_formats.answer_readers import ReasoningTags
from sagellm.chat_formats.block_format import BlockFormat
from sagellm.chat_formats.chat_format import SpecialTokens, ToolSpec, ToolUse
from sagellm.chat_formats.json_call import is_json_scalar, json_text, read_json
from sagellm.chat_formats.lark_rules import (
    Rules,
    bounded_text_up_to,
    inline_json,
    literal,
    marker,
    members,
    one_of,
    text_up_to,
)
from sagellm.chat_formats.part_writer import PartWriter
from sagellm.chat_formats.text_source import (
    MarkerFinder,
    TextReading,
    TextSource,
    Write,
    read_nested,
)
from sagellm.chat_formats.tool_schema import (
    OBJECT_KEYWORDS,
    ToolSchema,
    alternatives,
    check_bound,
    constants,
    length_bounds,
    members_of,
    resolved,
    schema_of,
)

_AFTER_NAME = re.compile(r"[^\w.-]")
_AFTER_KEY = re.compile(r"[:,{}\[\]<]")
_AFTER_SCALAR = re.compile(r"[,{}\[\]<]")
_BARE = re.compile(r"[\w.-]+")
_KNOWN = {
    "string": frozenset({"type", "minLength", "maxLength"}),
    "array": frozenset({"type", "items", "minItems", "maxItems"}),
    "object": OBJECT_KEYWORDS,
}
_SCALARS = frozenset({"number", "integer", "boolean", "null"})


def read_gemma_block(
    source: TextSource, writer: PartWriter, opening: str, *, quote: str, closing: str
) -> TextReading[bool]:
    yield from source.space()
    if not (yield from source.accept("call:")):
        return False
    name: list[str] = []
    yield from source.before(_AFTER_NAME, name.append)
    if (yield from source.peek()) != "{" or writer.begin_call("".join(name)) is None:
        return False
    source.stop_record()
    scalar, key = partial(_read_scalar, quote=quote), partial(_read_key, quote=quote)
    if not (yield from read_nested(source, writer.arguments, scalar, key)):
        return False
    yield from source.space()
    if not (yield from source.accept(closing)):
        source.skip_cut(closing)
    return True


def _read_key(source: TextSource, write: Write, quote: str) -> TextReading[bool]:
    yield from source.space()
    if not (yield from _read_text(source, write, quote)):
        name: list[str] = []
        yield from source.before(_AFTER_KEY, name.append)
        write(json_text("".join(name).strip()))
    yield from source.space()
    if not (yield from source.accept(":")):
        return False
    write(": ")
    return True


def _read_text(source: TextSource, write: Write, quote: str) -> TextReading[bool]:
    """Read a text between quotes, or a JSON string. Return whether there was one."""
    if (yield from source.peek()) == '"':
        return (yield from read_json(source, write))
    if not (yield from source.accept(quote)):
        return False
    write('"')
    finder = MarkerFinder((quote,))
    if (yield from source.until(finder, lambda text: write(json_text(text)[1:-1]))):
        write('"')
    return True


def _read_scalar(source: TextSource, write: Write, quote: str) -> TextReading[bool]:
    """Read a text, a number, true, false or null. A bare word is a text."""
    if (yield from _read_text(source, write, quote)):
        return True
    pieces: list[str] = []
    end = yield from source.before(_AFTER_SCALAR, pieces.append)
    text = "".join(pieces).strip()
    if end and text:
        write(text if is_json_scalar(text) else json_text(text))
    return bool(end and text)


def _rules(use: ToolUse, special_tokens: SpecialTokens, *, quote: str, closing: str) -> str:
    notation = _Notation(quote, special_tokens)
    calls = one_of(use, lambda tool: f"{literal(f'call:{tool.name}')} {notation.arguments(tool)}")
    block = f"block: call {marker(closing, special_tokens)}"
    return "\n".join([block, calls, *notation.lines])


class _Notation:
    """Collects the rules of values: one for each schema, as schemas may lead to themselves."""

    def __init__(self, quote: str, special_tokens: SpecialTokens) -> None:
        self._quote = quote
        self._special_tokens = special_tokens
        self._named: dict[int, tuple[ToolSchema, str]] = {}  # id of a schema -> it, and its rule
        self._rules = Rules()
        for rule in (
            f"text: {marker(quote, special_tokens)} text_end",
            text_up_to("text_end", quote, special_tokens),
            "any: text | any_scalar | any_list | any_object",
            'any_list: "[" (any ("," any)*)? "]"',
            'any_object: "{" (any_member ("," any_member)*)? "}"',
            'any_member: /[A-Za-z_][A-Za-z0-9_]*/ ":" any',
            f"any_scalar: {inline_json({'type': ['number', 'boolean', 'null']}, is_strict=True)}",
        ):
            self._rules.append(rule)

    @property
    def lines(self) -> list[str]:
        return self._rules.lines

    def arguments(self, tool: ToolSpec) -> str:
        """The name of the rule for the arguments of a tool."""
        root = schema_of(tool)
        return self._value(root, tool, root)

    def _value(self, schema: ToolSchema, tool: ToolSpec, root: ToolSchema) -> str:
        """The name of the rule for the values of a schema. `root`: the schema of all arguments."""
        if id(schema) not in self._named:
            name = f"value_{len(self._named)}"
            self._named[id(schema)] = schema, name
            self._rules.append(f"{name}: {self._values(schema, tool, root)}")
        return self._named[id(schema)][1]

    def _values(self, schema: ToolSchema, tool: ToolSpec, root: ToolSchema) -> str:
        options = alternatives(schema, root)
        if options != [schema]:
            check_bound(tool, schema, frozenset({"anyOf"}))
            return " | ".join(self._value(one, tool, root) for one in options)
        values = constants(schema)
        if values is not None:
            return " | ".join(map(self._constant, values))
        given = schema.get("type")
        if given is None:
            check_bound(tool, schema, frozenset())
            return "any"
        types = [given] if isinstance(given, str) else dict.fromkeys(given)
        return " | ".join(self._of_type(one, schema, tool, root) for one in types)

    def _of_type(self, name: str, schema: ToolSchema, tool: ToolSpec, root: ToolSchema) -> str:
        if name in _SCALARS:
            return inline_json({**schema, "type": name}, is_strict=tool.strict)
        if isinstance(schema.get("type"), str):  # else a keyword may belong to another type
            check_bound(tool, schema, _KNOWN.get(name, frozenset()))
        if name == "string":
            return self._text(schema)
        if name == "array":
            return self._list(schema, tool, root)
        return self._object(schema, tool, root)

    def _constant(self, value: Any) -> str:
        if isinstance(value, str):
            quote = marker(self._quote, self._special_tokens)
            return f"{quote} {literal(value)} {quote}"
        return literal(json.dumps(value))

    def _text(self, schema: ToolSchema) -> str:
        bounds = length_bounds(schema)
        if bounds is None:
            return "text"
        name = self._rules.new_name()
        rule = bounded_text_up_to(f"{name}_end", self._quote, self._special_tokens, bounds, "")
        self._rules.append(f"{name}: {marker(self._quote, self._special_tokens)} {name}_end")
        self._rules.append(rule)
        return name

    def _list(self, schema: ToolSchema, tool: ToolSpec, root: ToolSchema) -> str:
        item = self._value(resolved(schema.get("items", {}), root), tool, root)
        least, most = schema.get("minItems", 0), schema.get("maxItems")
        if most == 0:
            return '"[" "]"'
        more = f'("," {item}){{{max(least - 1, 0)},{"" if most is None else most - 1}}}'
        items = f"{item} {more}" if least else f"({item} {more})?"
        return f'"[" {items} "]"'

    def _object(self, schema: ToolSchema, tool: ToolSpec, root: ToolSchema) -> str:
        """The rule of an object. Members come in the order of the schema, required ones first."""
        if not schema.get("properties") and schema.get("additionalProperties") is not False:
            return "any_object"
        required: list[str] = []
        optional: list[str] = []
        for member in members_of(schema, root):
            value = self._value(member.schema, tool, root)
            name = self._rules.add(f'{self._key(member.name)} ":" {value}')
            (required if member.is_required else optional).append(name)
        return f'"{{" {members(required, optional, self._rules)} "}}"'

    def _key(self, name: str) -> str:
        return literal(name) if _BARE.fullmatch(name) else self._constant(name)


def _gemma_format(
    name: str, marks: tuple[str, str, str], tags: ReasoningTags | None = None
) -> BlockFormat:
    """`marks`: the opening and the closing of a call, and the quote."""
    opening, closing, quote = marks
    return BlockFormat(
        name=name,
        signs=(opening,),
        tags=tags,
        opening=opening,
        inner=(closing, quote),
        between="",
        read_block=partial(read_gemma_block, quote=quote, closing=closing),
        block_rules=partial(_rules, quote=quote, closing=closing),
    )


FUNCTION_GEMMA = _gemma_format(
    "function_gemma", ("<start_function_call>", "<end_function_call>", "<escape>")
)
GEMMA4 = _gemma_format(
    "gemma4",
    ("<|tool_call>", "<tool_call|>", '<|"|>'),
    ReasoningTags("<|channel>", "<channel|>", title="thought\n"),
)
