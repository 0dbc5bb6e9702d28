"""The format of GLM 4.5 and later: keys and values between tags.

    <tool_call>f
    <arg_key>x</arg_key>
    <arg_value>text as it is, or JSON</arg_value>
    </tool_call>

GLM 4.7 and 5 write no newlines between the tags.

Source: the chat templates of zai-org/GLM-4.5 and zai-org/GLM-4.7.
"""

import re

from sagellm.chat_formats.answer_readers import THINK
from sagellm.chat_formats.block_format import BlockFormat
from sagellm.chat_formats.chat_format import SpecialTokens, ToolSpec, ToolUse
from sagellm.chat_formats.hermes import CLOSING, OPENING
from sagellm.chat_formats.json_call import json_text
from sagellm.chat_formats.lark_rules import Rules, arguments_of, literal, marker, one_of
from sagellm.chat_formats.part_writer import PartWriter
from sagellm.chat_formats.tagged_values import UNWRITABLE, ValueRules, read_tagged_value
from sagellm.chat_formats.text_source import MarkerFinder, TextReading, TextSource

KEY, END_KEY = "<arg_key>", "</arg_key>"
VALUE, END_VALUE = "<arg_value>", "</arg_value>"
_AFTER_NAME = re.compile(r"[<\s]")
_END_KEYS = MarkerFinder((END_KEY,))


def read_glm_block(source: TextSource, writer: PartWriter, opening: str) -> TextReading[bool]:
    yield from source.space()
    name: list[str] = []
    end = yield from source.before(_AFTER_NAME, name.append)
    tool = writer.begin_call("".join(name)) if end else None
    if tool is None:
        return False
    source.stop_record()
    yield from source.space()
    between = "{"
    while (yield from source.accept(KEY)):
        key: list[str] = []
        yield from source.until(_END_KEYS, key.append)
        yield from source.space()
        if not (yield from source.accept(VALUE)):
            source.skip_cut(VALUE)
            return False
        text = "".join(key).strip()
        writer.arguments(f"{between}{json_text(text)}: ")
        yield from read_tagged_value(source, writer.arguments, tool, text, closing=END_VALUE)
        yield from source.space()
        between = ", "
    if not (yield from source.accept(CLOSING)):
        source.skip_cut(KEY, CLOSING)
        return False
    writer.arguments("{}" if between == "{" else "}")
    return True


def _rules(use: ToolUse, special_tokens: SpecialTokens) -> str:
    rules = Rules()
    values = ValueRules(rules=rules, closing=END_VALUE, special_tokens=special_tokens)
    calls = one_of(use, lambda tool: _call(tool, values))
    return "\n".join(
        [
            f"block: call {marker(CLOSING, special_tokens)}",
            "TAG_GAP: /\\n?/",
            calls,
            *rules.lines,
        ]
    )


def _call(tool: ToolSpec, values: ValueRules) -> str:
    """The text of a call. Adds the rules of its arguments to `values`. Raises UnboundSchema."""
    key, end_key, value = (marker(text, values.special_tokens) for text in (KEY, END_KEY, VALUE))
    parts = [literal(tool.name), "TAG_GAP"]
    for member in arguments_of(tool, UNWRITABLE):
        name = values.add(tool, member.schema)
        head = f"{key} {literal(member.name)} {end_key} TAG_GAP {value}"
        argument = f"{head} {name} TAG_GAP"
        parts.append(argument if member.is_required else f"({argument})?")
    return " ".join(parts)


GLM = BlockFormat(
    name="glm",
    signs=(OPENING, KEY, THINK.closing),
    countersigns=("<tool_sep>",),  # of other models, after the name
    tags=THINK,
    opening=OPENING,
    inner=(CLOSING, KEY, END_KEY, VALUE, END_VALUE),
    between="\n",
    read_block=read_glm_block,
    block_rules=_rules,
)
