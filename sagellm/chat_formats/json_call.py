"""Readers of JSON values, and of tool calls that are JSON objects with a name and arguments."""

import json
import re

from sagellm.chat_formats.part_writer import PartWriter
from sagellm.chat_formats.text_source import TextReading, TextSource, Write

_IN_STRING = re.compile(r'["\\]')
_IN_CONTAINER = re.compile(r'["{}\[\]]')
_AFTER_SCALAR = re.compile(r'[\s,:{}\[\]"]')
_SCALAR = re.compile(r"-?(0|[1-9][0-9]*)(\.[0-9]+)?([eE][-+]?[0-9]+)?|true|false|null", re.ASCII)
_ARGUMENTS = ("arguments", "parameters")
PYTHON_SCALARS = {"True": "true", "False": "false", "None": "null"}
_KNOWN = frozenset({"name", "type", "id", *_ARGUMENTS})  # members that may come before the name


def json_text(text: str) -> str:
    """The JSON string of a text."""
    return json.dumps(text, ensure_ascii=False)


def is_json_scalar(text: str) -> bool:
    """Whether the text is a number, true, false or null of JSON."""
    return _SCALAR.fullmatch(text) is not None


def read_json(source: TextSource, write: Write) -> TextReading[bool]:
    """Read and write one JSON value. Return whether its end has come.

    The reader looks at strings and brackets only: the value may be broken inside.
    """
    character = yield from source.peek()
    if not character or character not in '"{[':
        return bool((yield from source.before(_AFTER_SCALAR, write)))
    depth = 0
    while True:
        character = yield from source.take(write)
        if character == '"':
            yield from _read_string(source, write)
        elif character:
            depth += 1 if character in "{[" else -1
        if not depth or not character:
            return bool(character)
        yield from source.before(_IN_CONTAINER, write)


def _read_string(source: TextSource, write: Write) -> TextReading[None]:
    """Read the rest of a string, after its first quote."""
    while True:
        yield from source.before(_IN_STRING, write)
        if (yield from source.take(write)) != "\\":
            return
        yield from source.take(write)


def _read_whole(source: TextSource) -> TextReading[str]:
    """Read a JSON value, and return its text."""
    pieces: list[str] = []
    yield from read_json(source, pieces.append)
    return "".join(pieces)


def read_call(
    source: TextSource, writer: PartWriter, *, is_open: bool = False
) -> TextReading[bool]:
    """Read the object of one call, and write its call as soon as the name is known.

    The arguments are written as the model writes them; arguments before the name are written after
    it. A call without arguments, or with null, gets "{}". An object with a member of another name
    before the name of the tool is no call.

    `is_open`: the `{` of the object was read already. Return whether the object is complete.
    """
    has_begun, has_arguments, early = False, False, ""
    if not is_open and not (yield from source.accept("{")):
        return False
    while True:
        member = yield from _read_member(source)
        is_arguments = member in _ARGUMENTS and not has_arguments
        if member == "name" and not has_begun:
            name = string_value((yield from _read_whole(source)))
            if writer.begin_call(name) is None:
                return False
            has_begun = True
            source.stop_record()
            writer.arguments(early)
        elif is_arguments and has_begun and (yield from source.peek()) == "{":
            yield from read_json(source, writer.arguments)
        elif is_arguments:
            early = _object_text((yield from _read_whole(source)))
            writer.arguments(early if has_begun else "")
        elif has_begun or member in _KNOWN:
            yield from _read_whole(source)
        else:
            return False
        has_arguments |= is_arguments
        yield from source.space()
        if (yield from source.accept("}")):
            break
        if not (yield from source.accept(",")):
            return False
    writer.arguments("" if has_arguments or not has_begun else "{}")
    return has_begun


def _read_member(source: TextSource) -> TextReading[str]:
    """Read the name of a member up to its value. Return "" if there is none."""
    yield from source.space()
    if (yield from source.peek()) != '"':
        return ""
    name = string_value((yield from _read_whole(source)))
    yield from source.space()
    is_member = yield from source.accept(":")
    yield from source.space()
    return name if is_member else ""


def string_value(text: str) -> str:
    """The value of a JSON string; "" if the model wrote something else, or half a character."""
    try:
        value = json.loads(text)
        str(value).encode()  # a lone surrogate cannot be sent
    except (ValueError, RecursionError):
        return ""
    return value if isinstance(value, str) else ""


def _object_text(text: str) -> str:
    """The JSON text of arguments: that of an object, also if the model wrote it as a string."""
    if text == "null":
        return "{}"
    inner = string_value(text) if text.startswith('"') else ""
    return inner if inner.lstrip().startswith("{") else text
