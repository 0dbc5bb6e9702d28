"""The format of gpt-oss: messages in channels, "harmony".

    <|channel|>analysis<|message|>...<|end|><|start|>assistant<|channel|>final<|message|>...
    <|channel|>commentary to=functions.f <|constrain|>json<|message|>{"x": 1}<|call|>

`<|call|>` and `<|return|>` end the answer: engines stop there, and may leave the token out. So an
answer has at most one call.

Source: https://cookbook.openai.com/articles/openai-harmony
"""

import re
from dataclasses import dataclass

from sagellm.chat_formats.answer_readers import ReadingParser
from sagellm.chat_formats.block_format import draw_call_id
from sagellm.chat_formats.chat_format import (
    NO_SPECIAL_TOKENS,
    AnswerParser,
    DrawId,
    SpecialTokens,
    ToolUse,
    random_id,
)
from sagellm.chat_formats.json_call import read_json
from sagellm.chat_formats.lark_rules import (
    ANY_TEXT,
    arguments,
    literal,
    marker,
    one_of,
    response_rules,
    text_up_to,
)
from sagellm.chat_formats.part_writer import PartWriter
from sagellm.chat_formats.text_source import MarkerFinder, TextReading, TextSource
from sagellm.runtime.sampling import Grammar

START, CHANNEL, CONSTRAIN, MESSAGE = "<|start|>", "<|channel|>", "<|constrain|>", "<|message|>"
END, CALL, RETURN = "<|end|>", "<|call|>", "<|return|>"
_MARKERS = frozenset({START, CHANNEL, CONSTRAIN, MESSAGE, END, CALL, RETURN})
_HEADER_ENDS = MarkerFinder((MESSAGE, START, END, CALL, RETURN))
_BODY_ENDS = MarkerFinder((START, END, CALL, RETURN))
_CHANNEL = re.compile(r"<\|channel\|>\s*(\w+)")
_RECIPIENT = re.compile(r"to=functions\.([^\s<]+)")


class _Message:
    """The header of a message: whom the message is for, and its channel."""

    def __init__(self, header: str) -> None:
        recipient, channel = _RECIPIENT.search(header), _CHANNEL.search(header)
        self.tool = recipient.group(1) if recipient else ""
        self.is_reasoning = channel is not None and channel.group(1) == "analysis"


def _read_messages(source: TextSource, writer: PartWriter, header: str) -> TextReading[None]:
    """Read all messages. `header`: that of the first message, as far as the prompt has it."""
    had_content = had_reasoning = False
    while True:
        if MESSAGE not in header:
            pieces = [header]
            mark = yield from source.until(_HEADER_ENDS, pieces.append)
            header = "".join(pieces)
            if mark != MESSAGE:  # no message: the text ends, or the model lost the format
                text = header.removeprefix("assistant")
                writer.content(text if CHANNEL not in text else "")
                if not mark:
                    return
                header = ""
                continue
        message = _Message(header)
        if message.tool and writer.begin_call(message.tool) is not None:
            yield from _read_arguments(source, writer)
        elif message.is_reasoning:
            writer.reasoning("\n" if had_reasoning else "")
            had_reasoning = True
            yield from source.until(_BODY_ENDS, writer.reasoning)
        else:
            writer.content("\n" if had_content else "")
            had_content = True
            yield from source.until(_BODY_ENDS, writer.content)
        header = ""
        if not (yield from source.peek()):
            return


def _read_arguments(source: TextSource, writer: PartWriter) -> TextReading[None]:
    """Read the arguments of a call. A call without arguments gets "{}"."""
    yield from source.space()
    if (yield from source.peek()) == "{":  # a text in it may look like a marker
        yield from read_json(source, writer.arguments)
        yield from source.until(_BODY_ENDS, lambda text: None)
        return
    pieces: list[str] = []
    yield from source.until(_BODY_ENDS, pieces.append)
    writer.arguments("".join(pieces) or "{}")


def _begun(prompt: str) -> str:
    """Return the part of the answer's first message that the prompt has, after `<|start|>`."""
    _, start, message = prompt.rpartition(START)
    return message if start else ""


@dataclass(frozen=True, slots=True)
class HarmonyFormat:
    """Implements ChatFormat."""

    name: str = "harmony"
    takes_tools: bool = True
    has_reasoning: bool = True
    keeps_special_tokens: bool = True

    def matches(self, template: str) -> bool:
        return CHANNEL in template and MESSAGE in template

    def open_parser(
        self,
        use: ToolUse,
        prompt: str,
        *,
        special_tokens: SpecialTokens = NO_SPECIAL_TOKENS,
        draw_id: DrawId = random_id,
    ) -> AnswerParser:
        def read(source: TextSource, writer: PartWriter) -> TextReading[None]:
            return _read_messages(source, writer, _begun(prompt))

        writer = PartWriter(use, lambda: draw_call_id(draw_id))
        return ReadingParser(read, writer, special_tokens.keys() - _MARKERS)

    def grammar(
        self,
        use: ToolUse,
        prompt: str,
        *,
        response: Grammar | None = None,
        special_tokens: SpecialTokens = NO_SPECIAL_TOKENS,
    ) -> Grammar | None:
        if not use.needs_grammar(response):
            return None
        rules = one_of(use, lambda tool: f"{literal(tool.name + ' ')} json {arguments(tool)}")
        last = "call_message" if use.must_call else f"call_message | final {ANY_TEXT}"
        if response is not None and not use.must_call:
            last = "call_message | final response"
            rules += f"\n{response_rules(response)}"
        return _grammar(last, rules, prompt, special_tokens)

    def response_grammar(
        self, grammar: Grammar, prompt: str, *, special_tokens: SpecialTokens = NO_SPECIAL_TOKENS
    ) -> Grammar:
        return _grammar("final response", response_rules(grammar), prompt, special_tokens)


def _grammar(last: str, rules: str, prompt: str, special_tokens: SpecialTokens) -> Grammar:
    """The grammar of reasoning and preambles, and then a last message. `rules`: further rules."""
    channel, message, start, constrain = (
        marker(text, special_tokens) for text in (CHANNEL, MESSAGE, START, CONSTRAIN)
    )
    text = f"""\
start: {"rest " if MESSAGE in _begun(prompt) else ""}(note next)* last
last: {last}
note: {channel} ("analysis" | "commentary") {message} body
next: {start} "assistant"
rest: body next
{text_up_to("body", END, special_tokens)}
final: {channel} "final" {message}
call_message: {channel} "commentary to=functions." call
json: {constrain} "json" {message}
{rules}
"""
    return Grammar(kind="lark", text=text)


HARMONY = HarmonyFormat()
