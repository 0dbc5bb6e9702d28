"""The log of decisions: the events of a core, with their times and effects, in a file.

A header, then a frame for each event: its length in four bytes, most significant first, and a
MessagePack array [seconds, event, effects]. A log that reached its bound ends with an empty frame.
Exceptions are kept as their type's name and, where the text is safe to show, their text.
"""

from collections.abc import Iterator
from io import BufferedReader, BufferedWriter
from typing import Any

import msgspec

from sagellm.runtime.core.effects import Effect, OperatorFault
from sagellm.runtime.core.events import Event
from sagellm.runtime.port import EngineFacts
from sagellm.runtime.user_code import NamedError, WrongResult, name_of

MAGIC = b"sagellm decisions 1\n"
_LENGTH_BYTES = 4
_MOST_BYTES = 1 << 28  # of one frame: what claims more is no log


class LogError(ValueError):
    """A file that is no log of decisions."""


class Header(msgspec.Struct, frozen=True, omit_defaults=True):
    """What a core is made of: the graph (MessagePack), its engines' replicas, seed and bound; and,
    where its operators ask for prefix blocks, facts of the engines and what blocks are hashed with.
    """

    graph: bytes
    engines: dict[str, int]
    seed: int = 0
    max_hold_s: float | None = None  # None: for ever
    facts: dict[str, EngineFacts] = {}
    block_key: bytes = b""


class _Decision(msgspec.Struct, frozen=True, array_like=True):
    now: float
    event: Event
    effects: msgspec.Raw


class _ErrorText(msgspec.Struct, frozen=True):
    """An exception in a log. `wrong`: the text of a WrongResult, which is safe to show."""

    error: str
    wrong: str | None = None


class DecisionWriter:
    """Writes a log until it has `max_bytes`. Raises OSError where the disk does."""

    def __init__(self, file: BufferedWriter, header: Header, max_bytes: int) -> None:
        self._file = file
        self._num_left = max_bytes - len(MAGIC) - _LENGTH_BYTES  # of the mark that it is full
        self.is_full = False
        file.write(MAGIC)
        self._write(_encode(header))

    def record(self, now: float, event: Event, effects: list[Effect]) -> None:
        """Write one event and what it led to; nothing once the log is full."""
        if not self.is_full:
            self._write(_encode((now, event, effects)))

    def _write(self, content: bytes) -> None:
        self._num_left -= len(content) + _LENGTH_BYTES
        if self._num_left < 0:
            self.is_full, content = True, b""
        self._file.write(len(content).to_bytes(_LENGTH_BYTES, "big"))
        self._file.write(content)


class DecisionReader:
    """Reads a log. `is_cut` once it was read: it reached its bound, or its writer was killed.

    Raises LogError for a file that is none.
    """

    def __init__(self, file: BufferedReader) -> None:
        self._file = file
        self.is_cut = False
        if file.read(len(MAGIC)) != MAGIC:
            raise LogError("it is no log of decisions of this version")
        header = self._read()
        if header is None:
            raise LogError("it ends before its header")
        self.header: Header = _decode(header, Header)

    def __iter__(self) -> Iterator[tuple[float, Event, bytes]]:
        """Times, events and encoded effects."""
        while (content := self._read()) is not None:
            decision: _Decision = _decode(content, _Decision)
            yield decision.now, decision.event, bytes(decision.effects)

    def _read(self) -> bytes | None:
        prefix = self._file.read(_LENGTH_BYTES)
        length = int.from_bytes(prefix, "big")
        if length > _MOST_BYTES:
            raise LogError("it is damaged")
        content = self._file.read(length)
        if len(prefix) == _LENGTH_BYTES and length and len(content) == length:
            return content
        self.is_cut = bool(prefix)
        return None


def encode_effects(effects: list[Effect]) -> bytes:
    """As a log has them: equal effects give equal bytes."""
    return _encode(effects)


def shown_effects(content: bytes) -> list[Any]:
    """Encoded effects as plain values, for a person to read."""
    return list(msgspec.msgpack.decode(content))


def _plain(value: Any) -> Any:
    """What MessagePack has no type for."""
    if isinstance(value, OperatorFault):
        return [value.node, _plain(value.error)]
    if isinstance(value, Exception):
        wrong = str(value) if isinstance(value, WrongResult) else None
        return _ErrorText(name_of(value), wrong)
    return {"object": type(value).__name__}  # what a function of the user made of an answer


def _real(kind: type, value: Any) -> Any:
    if kind is Exception:
        text = msgspec.convert(value, _ErrorText)
        return NamedError(text.error) if text.wrong is None else WrongResult(text.wrong)
    raise NotImplementedError(kind)


_encode = msgspec.msgpack.Encoder(enc_hook=_plain).encode


def _decode(content: bytes, kind: Any) -> Any:
    try:
        return msgspec.msgpack.decode(content, type=kind, dec_hook=_real)
    except msgspec.DecodeError as error:
        raise LogError(f"it is damaged: {error}") from None
