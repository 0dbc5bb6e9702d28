"""The format of Qwen3-Coder, and of Qwen3.5: arguments between tags, one tag for each.

    <tool_call>
    <function=f>
    <parameter=x>
    text as it is, or JSON
    </parameter>
    </function>
    </tool_call>

The schema of the tool says which arguments are strings. Other arguments are JSON.

Source: the chat template of Qwen/Qwen3-Coder-30B-A3B-Instruct.
"""

import json
import re
from dataclasses import replace
from typing import Any

from sagellm.chat_formats.answer_readers import THINK
from sagellm.chat_formats.block_format import BlockFormat
from sagellm.chat_formats.chat_format import SpecialTokens, ToolSpec, ToolUse
from sagellm.chat_formats.hermes import CLOSING, OPENING
from sagellm.chat_formats.json_call import PYTHON_SCALARS
from sagellm.chat_formats.lark_rules import (
    Rules,
    bounded_text_up_to,
    inline_json,
    literal,
    marker,
    one_of,
    text_up_to,
)
from sagellm.chat_formats.part_writer import PartWriter
from sagellm.chat_formats.text_source import MarkerFinder, TextReading, TextSource, Write
from sagellm.chat_formats.tool_schema import (
    OBJECT_KEYWORDS,
    ToolSchema,
    check_bound,
    constants,
    definitions,
    length_bounds,
    member_schema,
    members_of,
    schema_of,
    type_of,
    types_of,
)

FUNCTION, END_FUNCTION = "<function=", "</function>"
PARAMETER, END_PARAMETER = "<parameter=", "</parameter>"
NEWLINE = "\n"
_AFTER_NAME = re.compile(r"[<>\s]")


def read_xml_block(source: TextSource, writer: PartWriter, opening: str) -> TextReading[bool]:
    if opening != FUNCTION:  # some models forget <tool_call>
        yield from source.space()
        if not (yield from source.accept(FUNCTION)):
            return False
    tool = writer.begin_call((yield from _read_name(source)))
    if tool is None:
        return False
    source.stop_record()
    yield from source.space()
    between = "{"
    while (yield from source.accept(PARAMETER)):
        name = yield from _read_name(source)
        writer.arguments(f"{between}{literal(name)}: ")
        yield from _read_value(source, writer.arguments, _schema_of(tool, name), tool)
        yield from source.space()
        between = ", "
    if not (yield from source.accept(END_FUNCTION)):
        source.skip_cut(PARAMETER, END_FUNCTION)
        return False
    writer.arguments("{}" if between == "{" else "}")
    yield from source.space()
    if not (yield from source.accept(CLOSING)):
        source.skip_cut(CLOSING)
    return True


def _read_name(source: TextSource) -> TextReading[str]:
    """Read a name and the end of its tag. Return "" if the tag does not end after the name."""
    pieces: list[str] = []
    yield from source.before(_AFTER_NAME, pieces.append)
    return "".join(pieces) if (yield from source.accept(">")) else ""


def _schema_of(tool: ToolSpec, name: str) -> ToolSchema:
    schema = schema_of(tool)
    found = member_schema(schema, name, schema)
    return {"type": "string"} if found is None else found


def _read_value(
    source: TextSource, write: Write, schema: ToolSchema, tool: ToolSpec
) -> TextReading[None]:
    """Read an argument, and write it as JSON. A newline at each end belongs to the tags."""
    yield from source.accept("\n")
    types = types_of(schema, schema_of(tool))
    finder = MarkerFinder((END_PARAMETER,))
    if types == {"string"}:
        write('"')
        text = _WithoutLastNewline(lambda piece: write(json.dumps(piece, ensure_ascii=False)[1:-1]))
        if (yield from source.until(finder, text.write)):
            write('"')
        return
    pieces: list[str] = []
    if (yield from source.until(finder, pieces.append)):
        write(_json_of("".join(pieces).removesuffix("\n"), types))


class _WithoutLastNewline:
    def __init__(self, write: Write) -> None:
        self._write = write
        self._held = ""

    def write(self, text: str) -> None:
        text = self._held + text
        kept = text.removesuffix("\n")
        self._held = text[len(kept) :]
        if kept:
            self._write(kept)


def _json_of(text: str, types: frozenset[str]) -> str:
    """The JSON text of an argument: the text itself if it is JSON of such a type, else a string."""
    given = PYTHON_SCALARS.get(text.strip(), text.strip())
    try:
        value = json.loads(given, parse_constant=_no_json)
    except (ValueError, RecursionError):
        return json.dumps(text, ensure_ascii=False)
    return given if type_of(value) in types else json.dumps(text, ensure_ascii=False)


def _no_json(constant: str) -> Any:
    """Refuse NaN and Infinity, which Python reads and JSON does not have."""
    raise ValueError(constant)


_STRING = frozenset({"type", "enum", "const", "minLength", "maxLength", "anyOf", "oneOf"})


def _rules(use: ToolUse, special_tokens: SpecialTokens) -> str:
    closing = marker(CLOSING, special_tokens)
    rules = Rules()
    calls = one_of(use, lambda tool: _call(tool, rules))
    return "\n".join([f'block: "\\n" call "{END_FUNCTION}\\n" {closing}', calls, *rules.lines])


def _call(tool: ToolSpec, rules: Rules) -> str:
    """The text of a call. Adds the rules of its arguments to `rules`. Raises UnboundSchema."""
    root = schema_of(tool)
    check_bound(tool, root, OBJECT_KEYWORDS)
    parts = [literal(f"{FUNCTION}{tool.name}>\n")]
    for member in members_of(root, root):
        name = rules.new_name()
        rules.append(_value(name, tool, member.schema))
        argument = f'{literal(f"{PARAMETER}{member.name}>" + NEWLINE)} {name} "\\n"'
        parts.append(argument if member.is_required else f"({argument})?")
    return " ".join(parts)


def _value(name: str, tool: ToolSpec, schema: ToolSchema) -> str:
    """The rule of an argument, with the tag that ends it."""
    root = schema_of(tool)
    types = types_of(schema, root)
    if "string" not in types:
        value = inline_json({**definitions(root), **schema}, is_strict=tool.strict)
        return f"{name}: {value} {literal(NEWLINE + END_PARAMETER)}"
    check_bound(tool, schema, _STRING)
    texts = constants(schema)
    if texts is not None:
        shown = (text if isinstance(text, str) else json.dumps(text) for text in texts)
        one = " | ".join(literal(text + NEWLINE + END_PARAMETER) for text in shown)
        return f"{name}: {one}"
    bounds = length_bounds(schema)
    if bounds is None:
        return text_up_to(name, END_PARAMETER, {})
    return bounded_text_up_to(name, END_PARAMETER, {}, bounds, NEWLINE)


QWEN3_CODER = BlockFormat(
    name="qwen3_coder",
    signs=(OPENING, FUNCTION),
    opening=OPENING,
    other_openings=(FUNCTION,),
    inner=(CLOSING,),
    between=NEWLINE,
    read_block=read_xml_block,
    block_rules=_rules,
)
QWEN3_5 = replace(
    QWEN3_CODER, name="qwen3_5", signs=(*QWEN3_CODER.signs, THINK.closing), tags=THINK
)
