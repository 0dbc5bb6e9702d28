"""The formats of FunctionGemma and Gemma 4: calls in a notation of their own.

    <start_function_call>call:f{x:<escape>text<escape>,n:[1,true]}<end_function_call>
    <|tool_call>call:f{x:<|"|>text<|"|>,n:[1,true]}<tool_call|>

Names of members are bare, texts stand between quotes of their own, the rest is as in JSON. The
arguments are written as JSON. The template that ships with Gemma 3 knows no tools.

Source: the chat templates of google/functiongemma-270m-it and google/gemma-4-31B-it.
"""

import re
from functools import partial

from sagellm.chat_formats.answer_readers import ReasoningTags
from sagellm.chat_formats.block_format import BlockFormat
from sagellm.chat_formats.gemma_rules import gemma_rules
from sagellm.chat_formats.json_call import is_json_scalar, json_text, read_json
from sagellm.chat_formats.nested_values import read_nested
from sagellm.chat_formats.part_writer import PartWriter
from sagellm.chat_formats.text_source import MarkerFinder, TextReading, TextSource, Write

_AFTER_NAME = re.compile(r"[^\w.-]")
_AFTER_KEY = re.compile(r"[:,{}\[\]<]")
_AFTER_SCALAR = re.compile(r"[,{}\[\]<]")


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
        block_rules=partial(gemma_rules, quote=quote, closing=closing),
    )


FUNCTION_GEMMA = _gemma_format(
    "function_gemma", ("<start_function_call>", "<end_function_call>", "<escape>")
)
GEMMA4 = _gemma_format(
    "gemma4",
    ("<|tool_call>", "<tool_call|>", '<|"|>'),
    ReasoningTags("<|channel>", "<channel|>", title="thought\n"),
)
