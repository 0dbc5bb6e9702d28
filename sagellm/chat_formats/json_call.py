"""One tool call as a JSON object, `{"name": ..., "arguments": {...}}`, in pieces of text."""

import json
import re

from sagellm.chat_formats.part_writer import PartWriter

_IN_STRING = re.compile(r'["\\]')
_IN_CONTAINER = re.compile(r'["{}\[\]]')
_AFTER_SCALAR = re.compile(r"[\s,:{}\[\]]")
_NO_SPACE = re.compile(r"\S")
_SCALAR = re.compile(r"[-0-9a-zA-Z]")


class JsonValueExtent:
    """Finds the end of one JSON value. It trusts the value: it looks at strings and brackets only.

    The value of a scalar ends before the character that follows it.
    """

    def __init__(self) -> None:
        self.is_complete = False
        self._is_begun = False
        self._is_scalar = False
        self._is_in_string = False
        self._is_escaped = False
        self._depth = 0

    def read(self, text: str, at: int) -> int:
        """Return where the value ends in a piece of text, from `at`; the length if it goes on."""
        while at < len(text) and not self.is_complete:
            at = self._step(text, at)
        return at

    def _step(self, text: str, at: int) -> int:
        if self._is_escaped:
            self._is_escaped = False
            return at + 1
        if self._is_scalar:
            return self._to_end_of_scalar(text, at)
        if not self._is_begun:
            return self._begin(text, at)
        found = (_IN_STRING if self._is_in_string else _IN_CONTAINER).search(text, at)
        if found is None:
            return len(text)
        self._pass(found.group())
        return found.end()

    def _begin(self, text: str, at: int) -> int:
        self._is_begun = True
        if text[at] not in '"{[':
            self._is_scalar = True
            return at
        self._pass(text[at])
        return at + 1

    def _pass(self, character: str) -> None:
        if self._is_in_string:
            self._is_escaped = character == "\\"
            self._is_in_string = self._is_escaped
        elif character == '"':
            self._is_in_string = True
        else:
            self._depth += 1 if character in "{[" else -1
        self.is_complete = self._depth == 0 and not self._is_in_string

    def _to_end_of_scalar(self, text: str, at: int) -> int:
        found = _AFTER_SCALAR.search(text, at)
        self.is_complete = found is not None
        return found.start() if found else len(text)


class JsonCall:
    """Reads the object of one call, and writes its call as soon as its name is known.

    The arguments are written as the model writes them. If they come before the name, they are
    written after it. `unused`: the text that was read while no call had begun; the caller owns the
    list. A call without arguments, or with null, gets "{}". Members with other names are ignored.
    """

    def __init__(self, writer: PartWriter, unused: list[str], arguments: tuple[str, ...]) -> None:
        self.is_complete = False
        self.is_broken = False
        self._writer = writer
        self._unused = unused
        self._argument_names = arguments
        self._expects = "{"  # the next character; "v": a value; "n": a name or "}"; ",": or "}"
        self._extent: JsonValueExtent | None = None
        self._value: list[str] = []
        self._member = ""  # the name of the member whose value is read
        self._early: str | None = None  # arguments that came before the name
        self._has_begun = False
        self._has_arguments = False
        self._streams = False  # the value is the arguments object, and goes on as it comes

    def read(self, text: str, at: int) -> int:
        """Read a piece of text from `at`. Return where the object ends, or breaks."""
        while at < len(text) and not (self.is_complete or self.is_broken):
            start = at
            if self._extent is None:
                at = self._read_between(text, at)
            else:
                at = self._read_value(text, at, self._extent)
            if not self._has_begun:
                self._unused.append(text[start:at])
        return at

    def _read_between(self, text: str, at: int) -> int:
        """Read white space and one character outside of names and values."""
        found = _NO_SPACE.search(text, at)
        if found is None:
            return len(text)
        character = found.group()
        if character == "}" and self._expects in ("n", ","):
            self._end()
        elif self._expects == "v" and (character in '"{[' or _SCALAR.match(character)):
            self._begin_value(character)
            return found.start()
        elif self._expects == "n" and character == '"':
            self._extent = JsonValueExtent()
            return found.start()
        elif self._expects != character:
            self.is_broken = True
            return found.start()
        else:
            self._expects = {"{": "n", ",": "n", ":": "v"}[character]
        return found.end()

    def _begin_value(self, character: str) -> None:
        self._extent = JsonValueExtent()
        if self._member in self._argument_names and not self._has_arguments:
            self._has_arguments = True
            self._streams = character == "{" and self._has_begun

    def _read_value(self, text: str, at: int, extent: JsonValueExtent) -> int:
        end = extent.read(text, at)
        if self._streams:
            self._writer.arguments(text[at:end])
        else:
            self._value.append(text[at:end])
        if extent.is_complete:
            self._end_value("".join(self._value))
        return end

    def _end_value(self, text: str) -> None:
        self._extent = None
        self._value.clear()
        if self._expects == "n":
            self._member, self._expects = _string(text), ":"
            return
        self._expects = ","
        if self._streams:
            self._streams = False
        elif self._member == "name" and not self._has_begun:
            self._begin(_string(text))
        elif self._member in self._argument_names and self._early is None:
            self._early = text
            self._write_early()

    def _begin(self, name: str) -> None:
        if not self._writer.begin_call(name):
            self.is_broken = True
            return
        self._has_begun = True
        self._unused.clear()
        self._write_early()

    def _write_early(self) -> None:
        if self._has_begun and self._early is not None:
            self._writer.arguments(_object_text(self._early))
            self._early = ""

    def _end(self) -> None:
        if not self._has_begun:
            self.is_broken = True
            return
        self.is_complete = True
        if not self._has_arguments:
            self._writer.arguments("{}")


def _string(text: str) -> str:
    """The text of a JSON string; "" if the model wrote something else."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return ""
    return value if isinstance(value, str) else ""


def _object_text(text: str) -> str:
    """The JSON text of arguments: that of an object, also if the model wrote it as a string."""
    if text == "null":
        return "{}"
    inner = _string(text) if text.startswith('"') else ""
    return inner if inner.lstrip().startswith("{") else text
