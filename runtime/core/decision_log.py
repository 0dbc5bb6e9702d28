"""The decision log: the events of a core, with their times and effects, in a file.

A header, then one frame for each event: four bytes of length, most significant first, and a
MessagePack array [seconds, event, effects]. An empty frame ends a log that reached its size limit.
Exceptions are kept as the name of their type and, where the text is safe to show, their text.
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
_MAX_FRAME_BYTES = 1 << 28  # a longer frame means that the file is no log


class LogError(ValueError):
    """A file is no decision log, or is damaged."""


class Header(msgspec.Struct, frozen=True, omit_defaults=True):
    """What a core is built from: the graph (MessagePack), engine replicas, seed and hold limit.

    If operators read prefix blocks, also the facts of the engines and the secret of the block
    hashes.
    """

    graph: bytes
    engines: dict[str, int]
    seed: int = 0
    max_hold_s: float | None = None  # None: forever
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
    """Writes a log of up to `max_bytes`. Raises OSError where the disk does."""

    def __init__(self, file: BufferedWriter, header: Header, max_bytes: int) -> None:
        self._file = file
        # One length is reserved for the frame that marks a full log.
        self._num_left = max_bytes - len(MAGIC) - _LENGTH_BYTES
        self.is_full = False
        file.write(MAGIC)
        self._write(_encode(header))

    def record(self, now: float, event: Event, effects: list[Effect]) -> None:
        """Write one event and its effects; nothing once the log is full."""
        if not self.is_full:
            self._write(_encode((now, event, effects)))

    def _write(self, content: bytes) -> None:
        self._num_left -= len(content) + _LENGTH_BYTES
        if self._num_left < 0:
            self.is_full, content = True, b""
        self._file.write(len(content).to_bytes(_LENGTH_BYTES, "big"))
        self._file.write(content)


class DecisionReader:
    """Reads a log. Raises LogError.

    `is_cut`, valid after reading: the log reached its limit, or its writer was killed.
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
        if length > _MAX_FRAME_BYTES:
            raise LogError("it is damaged")
        content = self._file.read(length)
        if len(prefix) == _LENGTH_BYTES and length and len(content) == length:
            return content
        self.is_cut = bool(prefix)
        return None


def encode_effects(effects: list[Effect]) -> bytes:
    """Effects as a log has them: equal effects give equal bytes."""
    return _encode(effects)


def shown_effects(content: bytes) -> list[Any]:
    """Encoded effects as plain values, for people to read."""
    return list(msgspec.msgpack.decode(content))


def _plain(value: Any) -> Any:
    """A value for a type that MessagePack lacks."""
    if isinstance(value, OperatorFault):
        return [value.node, _plain(value.error)]
    if isinstance(value, Exception):
        wrong = str(value) if isinstance(value, WrongResult) else None
        return _ErrorText(name_of(value), wrong)
    return {"object": type(value).__name__}  # the value that a user's function gave an answer


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
