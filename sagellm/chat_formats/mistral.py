"""The formats of Mistral: calls after the token `[TOOL_CALLS]`.

Models until Mistral Small 3.1 write a list, later ones each call by itself:

    [TOOL_CALLS][{"name": "f", "arguments": {"x": 1}}]
    [TOOL_CALLS]f[ARGS]{"x": 1}[TOOL_CALLS]g[ARGS]{}

Both are read for any of these models. An id that the model writes is not used. Mistral's templates
want ids of nine letters and digits.

Source: the chat templates of mistralai/Mistral-7B-Instruct-v0.3 and mistralai/Devstral-Small-2507.
"""

import re
from dataclasses import replace

from sagellm.chat_formats.answer_readers import THINK, ReasoningTags
from sagellm.chat_formats.block_format import BlockFormat
from sagellm.chat_formats.chat_format import SpecialTokens, ToolUse
from sagellm.chat_formats.json_call import read_call, read_json
from sagellm.chat_formats.lark_rules import arguments, json_call, literal, marker, one_of
from sagellm.chat_formats.part_writer import PartWriter
from sagellm.chat_formats.text_source import TextReading, TextSource

CALLS, ARGS, CALL_ID = "[TOOL_CALLS]", "[ARGS]", "[CALL_ID]"
ID_LEN = 9
_AFTER_NAME = re.compile(r"[^\w.-]")


def read_mistral_block(source: TextSource, writer: PartWriter, opening: str) -> TextReading[bool]:
    yield from source.space()
    if (yield from source.accept("[")):
        return (yield from _read_list(source, writer))
    name: list[str] = []
    yield from source.before(_AFTER_NAME, name.append)
    if (yield from source.accept(CALL_ID)):
        yield from source.before(_AFTER_NAME, lambda text: None)
    yield from source.accept(ARGS)  # lost where special tokens are not shown
    yield from source.space()
    if (yield from source.peek()) != "{" or writer.begin_call("".join(name)) is None:
        return False
    source.stop_record()
    return (yield from read_json(source, writer.arguments))


def _read_list(source: TextSource, writer: PartWriter) -> TextReading[bool]:
    while True:
        yield from source.space()
        if not (yield from read_call(source, writer)):
            return False
        source.start_record()
        yield from source.space()
        if (yield from source.accept("]")):
            return True
        if not (yield from source.accept(",")):
            return False


def _list_rules(use: ToolUse, special_tokens: SpecialTokens) -> str:
    more = ' (", " call)*' if use.parallel else ""
    call = one_of(use, lambda tool: json_call(tool, "arguments"))
    return f'block: / ?/ "[" call{more} "]"\n{call}'


def _rules(use: ToolUse, special_tokens: SpecialTokens) -> str:
    args = marker(ARGS, special_tokens)
    return "block: call\n" + one_of(
        use, lambda tool: f"{literal(tool.name)} {args} {arguments(tool)}"
    )


MISTRAL_LIST = BlockFormat(
    name="mistral_list",
    signs=(CALLS,),
    countersigns=(ARGS,),
    opening=CALLS,
    inner=(ARGS, CALL_ID),
    read_block=read_mistral_block,
    block_rules=_list_rules,
    call_id=lambda draw_id: draw_id(ID_LEN),
)
MISTRAL = replace(
    MISTRAL_LIST,
    name="mistral",
    signs=(CALLS, ARGS),
    countersigns=(),
    between="",
    block_rules=_rules,
)
MAGISTRAL = replace(
    MISTRAL,
    name="magistral",
    signs=(CALLS, ARGS, "[THINK]"),
    tags=ReasoningTags("[THINK]", "[/THINK]"),
)
MAGISTRAL_2506 = replace(
    MISTRAL,
    name="magistral_2506",
    signs=(CALLS, ARGS, THINK.closing),
    tags=THINK,
)
