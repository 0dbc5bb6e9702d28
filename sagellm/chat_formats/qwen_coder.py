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

import re
from dataclasses import replace

from sagellm.chat_formats.answer_readers import THINK
from sagellm.chat_formats.block_format import BlockFormat
from sagellm.chat_formats.chat_format import SpecialTokens, ToolSpec, ToolUse
from sagellm.chat_formats.hermes import CLOSING, OPENING
from sagellm.chat_formats.json_call import json_text
from sagellm.chat_formats.lark_rules import Rules, arguments_of, literal, marker, one_of
from sagellm.chat_formats.part_writer import PartWriter
from sagellm.chat_formats.tagged_values import UNWRITABLE, ValueRules, read_tagged_value
from sagellm.chat_formats.text_source import TextReading, TextSource

FUNCTION, END_FUNCTION = "<function=", "</function>"
PARAMETER, END_PARAMETER = "<parameter=", "</parameter>"
NEWLINE = "\n"
_AFTER_NAME = re.compile(r"[<>\s]")
_AFTER_KEY = re.compile(r"[<>\n]")


def read_xml_block(source: TextSource, writer: PartWriter, opening: str) -> TextReading[bool]:
    if opening != FUNCTION:  # some models forget <tool_call>
        yield from source.space()
        if not (yield from source.accept(FUNCTION)):
            return False
    tool = writer.begin_call((yield from _read_name(source, _AFTER_NAME)))
    if tool is None:
        return False
    source.stop_record()
    yield from source.space()
    between = "{"
    while (yield from source.accept(PARAMETER)):
        name = yield from _read_name(source, _AFTER_KEY)
        writer.arguments(f"{between}{json_text(name)}: ")
        yield from read_tagged_value(
            source, writer.arguments, tool, name, closing=END_PARAMETER, newline=NEWLINE
        )
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


def _read_name(source: TextSource, after: re.Pattern[str]) -> TextReading[str]:
    """Read a name and the end of its tag. Return "" if the tag does not end after the name."""
    pieces: list[str] = []
    yield from source.before(after, pieces.append)
    return "".join(pieces) if (yield from source.accept(">")) else ""


def _rules(use: ToolUse, special_tokens: SpecialTokens) -> str:
    closing = marker(CLOSING, special_tokens)
    rules = Rules()
    values = ValueRules(
        rules=rules, closing=END_PARAMETER, end=NEWLINE, special_tokens=special_tokens
    )
    calls = one_of(use, lambda tool: _call(tool, values))
    return "\n".join([f'block: "\\n" call "{END_FUNCTION}\\n" {closing}', calls, *rules.lines])


def _call(tool: ToolSpec, values: ValueRules) -> str:
    """The text of a call. Adds the rules of its arguments to `values`. Raises UnboundSchema."""
    parts = [literal(f"{FUNCTION}{tool.name}>\n")]
    for member in arguments_of(tool, UNWRITABLE):
        name = values.add(tool, member.schema)
        argument = f'{literal(f"{PARAMETER}{member.name}>" + NEWLINE)} {name} "\\n"'
        parts.append(argument if member.is_required else f"({argument})?")
    return " ".join(parts)


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
