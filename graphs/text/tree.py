"""Reads YAML as immutable plain values with positions. Tags are refused, and sizes are limited."""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NoReturn

from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.events import (
    AliasEvent,
    MappingEndEvent,
    MappingStartEvent,
    ScalarEvent,
    SequenceEndEvent,
    StreamEndEvent,
)

from sagellm.graphs.diagnostics import VALUE, Diagnostic, GraphError, Path, Position, truncated
from sagellm.graphs.ir import FrozenMap, Value

MAX_CHARACTERS = 65_536  # a graph of a thousand operators; reading takes about a second
MAX_VALUES = 20_000  # an alias counts as all values of its anchor
MAX_DEPTH = 24

_SYNTAX_HINTS = {  # a part of the parser's message -> a fix
    "'\\t'": "indent with spaces, not with tabs",
    "mapping values": "quote a text that holds `: `, or check the indentation",
    "expected ',' or": "what begins in line {line} is not closed",
    "end of stream": "the quote in line {line} is not closed",
    "<block end>": "check the indentation against line {line}",
    "could not find expected ':'": "write `name: value`",
    "cannot start any token": "quote the text",
    "escape": "double the backslash, or use single quotes",
}

_NULL = frozenset({"", "~", "null", "Null", "NULL"})
_BOOL = {"true": True, "True": True, "TRUE": True, "false": False, "False": False, "FALSE": False}
_INT = re.compile(r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_NOT_FINITE = re.compile(r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")
_INT64 = range(-(2**63), 2**63)


@dataclass(slots=True)
class Tree:
    """A YAML text as plain values, with the position of each path and the mistakes in the text."""

    value: Value
    positions: dict[Path, Position]
    mistakes: list[Diagnostic]


def read(text: str, *, file: str) -> Tree:
    """Read a text that is a single YAML 1.2 document.

    Raises GraphError for a syntax error and for a text beyond the limits. Other mistakes are in the
    result, so that the caller can report them together with the mistakes that it finds.
    """
    reader = _Reader(file)
    if len(text) > MAX_CHARACTERS:
        reader.refuse("too-large", Position(file, 1, 1), f"more than {MAX_CHARACTERS} characters")
    try:
        value = reader.document(text)
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = Position(file, mark.line + 1, mark.column + 1)
        reader.refuse("bad-yaml", place, str(error.problem or error.context), _syntax_hint(error))
    except YAMLError as error:  # without a mark: a character that YAML does not allow
        reader.refuse("bad-yaml", _nth(text, error, file), "a character that YAML does not allow")
    return Tree(value, reader.positions, reader.mistakes)


def _syntax_hint(error: MarkedYAMLError) -> str | None:
    for word, hint in _SYNTAX_HINTS.items():
        if word in str(error.problem):
            line = error.context_mark.line + 1 if error.context_mark else 1
            return hint.format(line=line)
    return None


def _nth(text: str, error: YAMLError, file: str) -> Position:
    """The position of an error that has only an offset in the text."""
    before = text[: getattr(error, "position", 0)]
    return Position(file, before.count("\n") + 1, len(before) - before.rfind("\n"))


@dataclass(slots=True)
class _Reader:
    """Turns parser events into values. Aliases share the value of their anchor."""

    file: str
    positions: dict[Path, Position] = field(default_factory=dict)
    mistakes: list[Diagnostic] = field(default_factory=list)
    num_values: int = 0
    _anchors: dict[str, tuple[Value, int]] = field(default_factory=dict)
    _events: Iterator[Any] = field(default_factory=lambda: iter(()))

    def refuse(self, code: str, place: Position, message: str, hint: str | None = None) -> NoReturn:
        raise GraphError((*self.mistakes, Diagnostic(code, (), message, hint, place)))

    def document(self, text: str) -> Value:
        self._events = iter(YAML(typ="safe", pure=True).parse(text))
        next(self._events)  # the start of the stream
        if isinstance(next(self._events), StreamEndEvent):
            self.refuse("empty", Position(self.file, 1, 1), "the file holds no graph")
        value = self._value(next(self._events), ())
        next(self._events)  # the end of the document
        extra = next(self._events)
        if not isinstance(extra, StreamEndEvent):
            self.refuse("two-documents", self._at(extra), "a second document", "one graph a file")
        return value

    def _at(self, event: Any) -> Position:
        mark = event.start_mark
        return Position(self.file, mark.line + 1, mark.column + 1)

    def _note(self, event: Any, code: str, message: str, hint: str) -> None:
        self.mistakes.append(Diagnostic(code, (), message, hint, self._at(event)))

    def _count(self, event: Any, num_values: int) -> None:
        self.num_values += num_values
        if self.num_values > MAX_VALUES:
            self.refuse("too-large", self._at(event), f"more than {MAX_VALUES} values")

    def _value(self, event: Any, path: Path) -> Value:
        self._count(event, 1)
        self.positions.setdefault(path, self._at(event))
        if isinstance(event, AliasEvent):
            return self._alias(event)
        before = self.num_values
        value = self._node(event, path)
        if event.anchor is not None:
            self._anchors[event.anchor] = value, self.num_values - before
        return value

    def _alias(self, event: Any) -> Value:
        if event.anchor not in self._anchors:  # true for an alias inside its own anchor too
            message = f"no value before this place is anchored as `&{event.anchor}`"
            self._note(event, "unknown-alias", message, "write the value itself")
            return None
        value, num_values = self._anchors[event.anchor]
        self._count(event, num_values)  # otherwise a short text could expand to billions of values
        return value

    def _node(self, event: Any, path: Path) -> Value:
        if event.tag is not None:
            hint = "write the value itself; quote it to make it a text"
            self._note(event, "tag", f"tags are not read: `{event.tag}`", hint)
        if isinstance(event, ScalarEvent):
            self.positions[*path, VALUE] = self._at(event)
            return self._scalar(event)
        if len(path) >= MAX_DEPTH:  # this reader and its callers are recursive
            self.refuse("too-deep", self._at(event), f"nested deeper than {MAX_DEPTH} levels")
        mapping = isinstance(event, MappingStartEvent)
        return self._mapping(path) if mapping else self._sequence(path)

    def _sequence(self, path: Path) -> Value:
        items: list[Value] = []
        while not isinstance(event := next(self._events), SequenceEndEvent):
            items.append(self._value(event, (*path, len(items))))
        return tuple(items)

    def _mapping(self, path: Path) -> Value:
        items: dict[str, Value] = {}
        while not isinstance(event := next(self._events), MappingEndEvent):
            key = self._key(event)
            if key is None:
                self._skip_value()
            elif key in items:
                self._repeated(event, path, key)
            else:
                self.positions[*path, key] = self._at(event)
                items[key] = self._value(next(self._events), (*path, key))
        return FrozenMap(items)

    def _key(self, event: Any) -> str | None:
        if not isinstance(event, ScalarEvent):
            self._note(event, "bad-key", "a key must be a name", "write `name: value`")
            self._skip(event)
            return None
        key = self._node(event, ())
        # `<<` merges mappings in YAML 1.1, but not in YAML 1.2.
        if isinstance(key, str) and not (key == "<<" and event.style is None):
            return key
        hint = "repeat the entries" if key == "<<" else f'quote it: "{truncated(event.value)}"'
        self._note(event, "bad-key", f"`{truncated(event.value)}` is no name for a key", hint)
        return None

    def _repeated(self, event: Any, path: Path, key: str) -> None:
        first = self.positions[*path, key]
        hint = f"the first is in line {first.line}; remove one of them"
        self._note(event, "duplicate-key", f"`{key}` stands twice", hint)
        self._skip_value()

    def _skip_value(self) -> None:
        self._skip(next(self._events))

    def _skip(self, event: Any) -> None:
        """Read a value and drop it with its positions, but keep its mistakes."""
        kept = self.positions
        self.positions = {}
        self._value(event, ())
        self.positions = kept

    def _scalar(self, event: Any) -> Value:
        text = str(event.value)
        if any("\ud800" <= letter <= "\udfff" for letter in text):
            self._note(event, "bad-text", "half a surrogate pair is no text", "write the character")
            return None
        if not event.implicit[0]:  # quoted or a block, and therefore a text
            return text
        return self._number(event, text)

    def _number(self, event: Any, text: str) -> Value:
        if not _fits(text):
            message = f"`{truncated(text)}` does not fit 64 bits"
            self._note(event, "too-large", message, "write a smaller number")
            return None
        if not _is_finite(text):
            message = f"`{truncated(text)}` is no finite number"
            self._note(event, "not-finite", message, "write a number")
            return None
        return plain_scalar(text)


def _fits(text: str) -> bool:
    """Whether an integer fits 64 bits; true for other texts. Long texts are not parsed, because
    `int` raises for thousands of digits.
    """
    if not _INT.fullmatch(text):
        return True
    return len(text.lstrip("+-0ox")) <= 64 and plain_scalar(text) in _INT64


def _is_finite(text: str) -> bool:
    if _NOT_FINITE.fullmatch(text):
        return False
    return _FLOAT.fullmatch(text) is None or math.isfinite(float(text))


def plain_scalar(text: str) -> Value:
    """The YAML 1.2 value of an unquoted text. `yes`, `on` and `1_000` stay texts."""
    if text in _NULL:
        return None
    if text in _BOOL:
        return _BOOL[text]
    if _INT.fullmatch(text):
        return int(text, 0 if text[:2] in ("0o", "0x") else 10)
    return float(text) if _FLOAT.fullmatch(text) else text
