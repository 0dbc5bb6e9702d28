"""The format of Llama 3.2, Llama 4 and others with templates that ask for calls in Python syntax.

    [f(x=1, city='Paris'), g()]

The list is the whole answer. The arguments are keyword arguments, whose values are literals of
Python. They become JSON. The literals of JSON are read, too.

Source: tool_chat_template_llama4_pythonic.jinja and others of vLLM whose names end alike.
"""

import json
import re

from sagellm.chat_formats.block_format import BlockFormat
from sagellm.chat_formats.chat_format import SpecialTokens, ToolSpec, ToolUse
from sagellm.chat_formats.json_call import PYTHON_SCALARS, is_json_scalar, json_text
from sagellm.chat_formats.lark_rules import (
    Rules,
    arguments_of,
    inline_json,
    literal,
    members,
    one_of,
)
from sagellm.chat_formats.part_writer import PartWriter
from sagellm.chat_formats.text_source import TextReading, TextSource, Write, read_nested
from sagellm.chat_formats.tool_schema import (
    ToolSchema,
    constants,
    definitions,
    schema_of,
    types_of,
)

TOKENS = ("<|python_tag|>", "<|python_start|>")
END_TOKEN = "<|python_end|>"
_AFTER_NAME = re.compile(r"[^\w.-]")
_AFTER_WORD = re.compile(r"[\s=:,()\[\]{}'\"]")
_IN_STRING = {"'": re.compile(r"['\\]"), '"': re.compile(r'["\\]')}
_ESCAPES = {
    **{"n": r"\n", "t": r"\t", "r": r"\r", "b": r"\b", "f": r"\f", "a": r"\u0007", "v": r"\u000b"},
    **{"0": r"\u0000", "\\": r"\\", '"': r"\"", "'": "'", "/": "/", "\n": ""},
}
_NUM_DIGITS = {"x": 2, "u": 4, "U": 8}
_HEX_DIGITS = frozenset("0123456789abcdefABCDEF")


def read_pythonic_block(source: TextSource, writer: PartWriter, opening: str) -> TextReading[bool]:
    if opening in TOKENS:
        yield from source.space()
        if not (yield from source.accept("[")):
            return False
    return (yield from read_python_calls(source, writer))


def read_python_calls(source: TextSource, writer: PartWriter) -> TextReading[bool]:
    """Read a list of calls after its bracket. Return whether it is complete and has a call."""
    has_call = False
    while True:
        yield from source.space()
        if has_call and (yield from source.accept("]")):
            return True
        name: list[str] = []
        yield from source.before(_AFTER_NAME, name.append)
        yield from source.space()
        if not (yield from source.accept("(")) or writer.begin_call("".join(name)) is None:
            return False
        has_call = True
        source.stop_record()
        if not (yield from _read_arguments(source, writer.arguments)):
            return False
        source.start_record()
        yield from source.space()
        if not (yield from source.accept(",")) and (yield from source.peek()) != "]":
            return False


def _read_arguments(source: TextSource, write: Write) -> TextReading[bool]:
    """Read arguments after their parenthesis, and write them as an object."""
    between = "{"
    yield from source.space()
    while not (yield from source.accept(")")):
        name: list[str] = []
        yield from source.before(_AFTER_WORD, name.append)
        yield from source.space()
        if not name or not (yield from source.accept("=")):
            return False
        write(f"{between}{json_text(''.join(name))}: ")
        if not (yield from read_nested(source, write, _read_scalar, _read_key)):
            return False
        between = ", "
        yield from source.space()
        if not (yield from source.accept(",")) and (yield from source.peek()) != ")":
            return False
        yield from source.space()
    write("{}" if between == "{" else "}")
    return True


def _read_key(source: TextSource, write: Write) -> TextReading[bool]:
    yield from source.space()
    if (yield from source.peek()) in _IN_STRING:
        yield from _read_string(source, write)
    else:
        name: list[str] = []
        yield from source.before(_AFTER_WORD, name.append)
        write(json_text("".join(name)))
    yield from source.space()
    if not (yield from source.accept(":")):
        return False
    write(": ")
    return True


def _read_scalar(source: TextSource, write: Write) -> TextReading[bool]:
    """Read a string, a number, True, False or None. A bare word is a text."""
    if (yield from source.peek()) in _IN_STRING:
        return (yield from _read_string(source, write))
    pieces: list[str] = []
    end = yield from source.before(_AFTER_WORD, pieces.append)
    if end and pieces:
        write(_scalar("".join(pieces)))
    return bool(end and pieces)


def _scalar(text: str) -> str:
    given = PYTHON_SCALARS.get(text, text)
    return given if is_json_scalar(given) else _number(text) or json_text(text)


def _number(text: str) -> str:
    """The JSON of a number that Python writes in another way, such as `.5`; "" for a word."""
    for kind in (int, float):
        try:
            return json.dumps(kind(text), allow_nan=False)
        except ValueError:
            continue
    return ""


def _read_string(source: TextSource, write: Write) -> TextReading[bool]:
    """Read a string of Python. Return whether its end has come."""
    quote = yield from source.take(lambda text: None)
    write('"')
    while True:
        end = yield from source.before(_IN_STRING[quote], lambda text: write(json_text(text)[1:-1]))
        yield from source.accept(end)
        if end == quote:
            write('"')
        if end != "\\":
            return bool(end)
        yield from _read_escape(source, write)


def _read_escape(source: TextSource, write: Write) -> TextReading[None]:
    """Read an escape after its backslash. Python keeps the backslash of an unknown one."""
    kind = yield from source.take(lambda text: None)
    if kind in _ESCAPES:
        write(_ESCAPES[kind])
        return
    digits: list[str] = []
    while len(digits) < _NUM_DIGITS.get(kind, 0) and (yield from source.peek()) in _HEX_DIGITS:
        yield from source.take(digits.append)
    value = "".join(digits)
    if kind and len(value) == _NUM_DIGITS.get(kind):
        write(_character(value))
    elif kind:
        write(json_text(f"\\{kind}{value}")[1:-1])


def _character(digits: str) -> str:
    """The JSON escape of a character. Half a surrogate pair stays an escape."""
    code = int(digits, 16)
    if code <= 0xFFFF:
        return f"\\u{code:04x}"
    return chr(code) if code <= 0x10FFFF else "\N{REPLACEMENT CHARACTER}"


def _rules(use: ToolUse, special_tokens: SpecialTokens) -> str:
    more = ' (", " call)*' if use.parallel else ""
    rules = Rules()
    calls = one_of(use, lambda tool: _call(tool, rules))
    return "\n".join([f'block: "[" call{more} "]"', calls, *rules.lines])


def _call(tool: ToolSpec, rules: Rules) -> str:
    """The text of a call. Adds the rules of its arguments to `rules`. Raises UnboundSchema."""
    root = schema_of(tool)
    required: list[str] = []
    optional: list[str] = []
    for member in arguments_of(tool, _AFTER_WORD):
        value = _value(tool, member.schema, root)
        name = rules.add(f"{literal(f'{member.name}=')} ({value})")
        (required if member.is_required else optional).append(name)
    return f'{literal(f"{tool.name}(")} {members(required, optional, rules, ", ")} ")"'


def _value(tool: ToolSpec, schema: ToolSchema, root: ToolSchema) -> str:
    """The text of an argument: JSON, whose strings and numbers are those of Python."""
    if types_of(schema, root) == {"boolean"} and constants(schema) is None:
        return '"True" | "False"'
    return inline_json({**definitions(root), **schema}, is_strict=tool.strict)


PYTHONIC = BlockFormat(
    name="pythonic",
    signs=("[func_name1(param",),  # the templates ask the model for this
    other_openings=TOKENS,
    first="[",
    inner=(END_TOKEN,),
    read_block=read_pythonic_block,
    block_rules=_rules,
)
