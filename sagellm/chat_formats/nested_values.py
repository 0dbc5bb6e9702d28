"""A reader of nested lists and objects in notations that are not JSON. They become JSON."""

from collections.abc import Callable
from typing import TypeAlias

from sagellm.chat_formats.text_source import TextReading, TextSource, Write

# Reads a scalar, or a key with the mark after it, and writes it as JSON. Returns whether there was
# a whole one.
ReadPart: TypeAlias = Callable[[TextSource, Write], TextReading[bool]]

_BRACKETS = {"{": "}", "[": "]"}


def read_nested(
    source: TextSource, write: Write, read_scalar: ReadPart, read_key: ReadPart
) -> TextReading[bool]:
    """Read a value, and write it as JSON. Return whether it is complete.

    The brackets that are open are a list, not calls in calls: a model may open very many.
    """
    closings: list[str] = []
    while True:
        yield from source.space()
        bracket = yield from _accept_bracket(source)
        if bracket:
            write(bracket)
            closings.append(_BRACKETS[bracket])
        elif not (yield from read_scalar(source, write)):
            return False
        is_first = bool(bracket)
        yield from source.space()
        while closings and (yield from source.accept(closings[-1])):
            write(closings.pop())
            is_first = False
            yield from source.space()
        if not closings:
            return True
        if not is_first:
            if not (yield from source.accept(",")):
                return False
            write(", ")
        if closings[-1] == "}" and not (yield from read_key(source, write)):
            return False


def _accept_bracket(source: TextSource) -> TextReading[str]:
    for bracket in _BRACKETS:
        if (yield from source.accept(bracket)):
            return bracket
    return ""
