"""The format of Hermes, Qwen2.5, QwQ, Qwen3 and sage-tiny: JSON objects between tags.

    <tool_call>
    {"name": "f", "arguments": {"x": 1}}
    </tool_call>

Source: the chat templates of NousResearch/Hermes-3-Llama-3.1-8B and Qwen/Qwen3-8B.
"""

from dataclasses import replace

from sagellm.chat_formats.answer_readers import THINK
from sagellm.chat_formats.block_format import BlockFormat
from sagellm.chat_formats.chat_format import SpecialTokens, ToolUse
from sagellm.chat_formats.json_call import read_call
from sagellm.chat_formats.lark_rules import json_call, marker, one_of
from sagellm.chat_formats.part_writer import PartWriter
from sagellm.chat_formats.text_source import TextReading, TextSource

OPENING, CLOSING = "<tool_call>", "</tool_call>"


def read_hermes_block(source: TextSource, writer: PartWriter, opening: str) -> TextReading[bool]:
    yield from source.space()
    if not (yield from read_call(source, writer)):
        return False
    yield from source.space()
    if not (yield from source.accept(CLOSING)):  # some models forget it
        source.skip_cut(CLOSING)
    return True


def _rules(use: ToolUse, special_tokens: SpecialTokens) -> str:
    closing = marker(CLOSING, special_tokens)
    call = one_of(use, lambda tool: json_call(tool, "arguments"))
    return f'block: "\\n" call "\\n" {closing}\n{call}'


HERMES = BlockFormat(
    name="hermes",
    signs=(OPENING,),
    countersigns=("<arg_key>",),  # GLM writes arguments between tags
    opening=OPENING,
    inner=(CLOSING,),
    between="\n",
    read_block=read_hermes_block,
    block_rules=_rules,
)
QWEN3 = replace(HERMES, name="qwen3", signs=(OPENING, THINK.closing), tags=THINK)
