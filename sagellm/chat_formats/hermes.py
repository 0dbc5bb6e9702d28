"""The format of Hermes, Qwen2.5, QwQ, Qwen3 and sage-tiny: JSON between `<tool_call>` tags.

    <tool_call>
    {"name": "f", "arguments": {"x": 1}}
    </tool_call>

Source: the chat templates of NousResearch/Hermes-3-Llama-3.1-8B and Qwen/Qwen3-8B.
"""

from dataclasses import replace

from sagellm.chat_formats.block_format import BlockFormat
from sagellm.chat_formats.call_blocks import BlockState
from sagellm.chat_formats.chat_format import SpecialTokens, ToolSpec, ToolUse
from sagellm.chat_formats.json_call import JsonCall
from sagellm.chat_formats.lark_text import arguments, calls, literal, marker
from sagellm.chat_formats.part_writer import PartWriter
from sagellm.chat_formats.reasoning import THINK

OPENING, CLOSING = "<tool_call>", "</tool_call>"
NEWLINE = "\n"


class HermesBlock:
    """One call, up to its closing tag. A forgotten closing tag does no harm."""

    def __init__(self, writer: PartWriter) -> None:
        self.state = BlockState.READING
        self.unused: list[str] = []
        self._call = JsonCall(writer, self.unused, ("arguments", "parameters"))

    def read(self, text: str) -> int:
        at = self._call.read(text, 0)
        if self._call.is_broken:
            self.state = BlockState.BROKEN
        if not self._call.is_complete:
            return at
        rest = text[at:].lstrip()
        at = len(text) - len(rest)
        if rest and not CLOSING.startswith(rest[: len(CLOSING)]):
            self.state = BlockState.COMPLETE
        elif rest.startswith(CLOSING):
            self.state = BlockState.COMPLETE
            at += len(CLOSING)
        return at


def hermes_rules(use: ToolUse, special_tokens: SpecialTokens) -> str:
    opening, closing = marker(OPENING, special_tokens), marker(CLOSING, special_tokens)

    def call(tool: ToolSpec) -> str:
        head = literal(f'\n{{"name": {literal(tool.name)}, "arguments": ')
        return f"{opening} {head} {arguments(tool)} {literal('}' + NEWLINE)} {closing}"

    return calls(use, call, literal(NEWLINE))


HERMES = BlockFormat(
    name="hermes",
    signs=(OPENING,),
    openings=(OPENING,),
    inner=(CLOSING,),
    open_block=lambda writer, opening: HermesBlock(writer),
    call_rules=hermes_rules,
)
QWEN3 = replace(HERMES, name="qwen3", signs=(OPENING, THINK.closing), tags=THINK)
