"""The formats of DeepSeek and Kimi: calls in a section, each between tokens.

    <｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>f
    ```json
    {"x": 1}
    ```<｜tool▁call▁end｜><｜tool▁calls▁end｜>

DeepSeek V3 and R1 write this, and V3.1 writes `f<｜tool▁sep｜>{"x": 1}`. Kimi K2 has other tokens,
and writes `functions.f:0` for the name. This is also the id of the call, which Kimi's template
shows to the model again. The templates that DeepSeek ships show the model no tools. Those of vLLM
do.

Source: vLLM's tool_chat_template_deepseekv3.jinja, deepseekr1 and deepseekv31, and the chat
template of moonshotai/Kimi-K2-Instruct.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeAlias

from sagellm.chat_formats.answer_readers import THINK
from sagellm.chat_formats.block_format import BlockFormat
from sagellm.chat_formats.chat_format import SpecialTokens, ToolUse
from sagellm.chat_formats.json_call import read_json
from sagellm.chat_formats.lark_rules import arguments, literal, marker, one_of
from sagellm.chat_formats.part_writer import PartWriter
from sagellm.chat_formats.text_source import TextReading, TextSource

FENCE, END_FENCE = "```json", "```"
_AFTER_NAME = re.compile(r"[^\w.:-]")
_KIMI_ID = re.compile(r"functions\.([\w-]+):[0-9]+", re.ASCII)


@dataclass(frozen=True, slots=True, kw_only=True)
class SectionTokens:
    """The tokens of a section: around all calls, around each call, and before its arguments."""

    opening: str
    call: str
    separator: str
    end_call: str
    closing: str


def read_section(
    source: TextSource, writer: PartWriter, opening: str, *, tokens: SectionTokens
) -> TextReading[bool]:
    yield from source.space()
    if opening == tokens.opening and not (yield from source.accept(tokens.call)):
        return False
    while (yield from _read_call(source, writer, tokens)):
        yield from source.space()
        source.start_record()
        if not (yield from source.accept(tokens.call)):
            if not (yield from source.accept(tokens.closing)):
                source.skip_cut(tokens.call, tokens.closing)
            return True
    return False


def _read_call(source: TextSource, writer: PartWriter, tokens: SectionTokens) -> TextReading[bool]:
    name = yield from _read_name(source)
    if not (yield from source.accept(tokens.separator)):
        return False
    yield from source.space()
    if (yield from source.peek()) != "{":  # V3: the name was the kind of the tool
        name = yield from _read_name(source)
        yield from source.accept(FENCE)
        yield from source.space()
    kimi = _KIMI_ID.fullmatch(name)
    tool, call_id = (kimi.group(1), name) if kimi else (name, "")
    if (yield from source.peek()) != "{" or writer.begin_call(tool, call_id) is None:
        return False
    source.stop_record()
    if not (yield from read_json(source, writer.arguments)):
        return False
    yield from source.space()
    yield from source.accept(END_FENCE)
    yield from source.space()
    if not (yield from source.accept(tokens.end_call)):
        source.skip_cut(END_FENCE, tokens.end_call)
    return True


def _read_name(source: TextSource) -> TextReading[str]:
    """Read a name and the white space around it."""
    name: list[str] = []
    yield from source.space()
    yield from source.before(_AFTER_NAME, name.append)
    yield from source.space()
    return "".join(name)


# The rule of a call's name: from the name of the tool, and the rule of the separator.
NameRule: TypeAlias = Callable[[str, str], str]


def _rules(
    use: ToolUse,
    special_tokens: SpecialTokens,
    *,
    tokens: SectionTokens,
    name: NameRule,
    between: str = "",
    tail: str = "",
) -> str:
    """`between`: the text between two calls. `tail`: the text after the arguments."""
    call, separator, end_call, closing = (
        marker(text, special_tokens)
        for text in (tokens.call, tokens.separator, tokens.end_call, tokens.closing)
    )
    more = f" ({literal(between)} one)*" if use.parallel else ""
    calls = one_of(
        use, lambda tool: f"{name(tool.name, separator)} {arguments(tool)} {literal(tail)}"
    )
    return f"block: one{more} {closing}\none: {call} call {end_call}\n{calls}"


_DEEPSEEK = SectionTokens(
    opening="<｜tool▁calls▁begin｜>",
    call="<｜tool▁call▁begin｜>",
    separator="<｜tool▁sep｜>",
    end_call="<｜tool▁call▁end｜>",
    closing="<｜tool▁calls▁end｜>",
)
_KIMI = SectionTokens(
    opening="<|tool_calls_section_begin|>",
    call="<|tool_call_begin|>",
    separator="<|tool_call_argument_begin|>",
    end_call="<|tool_call_end|>",
    closing="<|tool_calls_section_end|>",
)
_SHOWS_TOOLS = " in tools"  # of the loop over the tools


def _section_format(
    name: str, tokens: SectionTokens, signs: tuple[str, ...], rules: Callable[..., str]
) -> BlockFormat:
    return BlockFormat(
        name=name,
        signs=(tokens.opening, *signs),
        opening=tokens.opening,
        other_openings=(tokens.call,),
        inner=(tokens.separator, tokens.end_call, tokens.closing),
        read_block=partial(read_section, tokens=tokens),
        block_rules=partial(rules, tokens=tokens),
    )


def _v3_name(name: str, separator: str) -> str:
    return f'"function" {separator} ' + literal(f"{name}\n{FENCE}\n")


def _v3_1_name(name: str, separator: str) -> str:
    return f"{literal(name)} {separator}"


def _kimi_name(name: str, separator: str) -> str:
    return f"{literal(f'functions.{name}:')} /[0-9]{{1,4}}/ {separator}"


DEEPSEEK_V3 = _section_format(
    "deepseek_v3",
    _DEEPSEEK,
    (FENCE, _SHOWS_TOOLS),
    partial(_rules, name=_v3_name, between="\n", tail=f"\n{END_FENCE}"),
)
DEEPSEEK_R1 = replace(
    DEEPSEEK_V3, name="deepseek_r1", signs=(*DEEPSEEK_V3.signs, THINK.closing), tags=THINK
)
DEEPSEEK_V3_1 = replace(
    _section_format(
        "deepseek_v3_1",
        _DEEPSEEK,
        (_SHOWS_TOOLS, THINK.closing),
        partial(_rules, name=_v3_1_name),
    ),
    countersigns=(FENCE,),
    tags=THINK,
)
KIMI_K2 = _section_format("kimi_k2", _KIMI, (), partial(_rules, name=_kimi_name))
KIMI_K2_THINKING = replace(
    KIMI_K2, name="kimi_k2_thinking", signs=(*KIMI_K2.signs, THINK.closing), tags=THINK
)
