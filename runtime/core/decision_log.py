"""The decision log: a file of the events of a core, with their times and effects.

The file has `MAGIC`, then frames: a length of four bytes (big-endian), and MessagePack content. The
first frame is the `Header`. Each other frame is an array [seconds, event, effects]. An empty frame
ends a log that reached its size limit. Exceptions are written as the name of their type, with their
text only if the text is safe to show.
"""

from collections.abc import Iterator, Sequence
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
    """The data needed to build the same core for a replay.

    `graph`: MessagePack. `engines`: the number of replicas of each engine. `facts` and `block_key`
    (the secret of block hashes) are present only if operators read prefix blocks.
    """

    graph: bytes
    engines: dict[str, int]
    seed: int = 0
    max_hold_s: float | None = None  # None: no limit
    facts: dict[str, EngineFacts] = {}
    block_key: bytes = b""


class _Decision(msgspec.Struct, frozen=True, array_like=True):
    now: float
    event: Event
    effects: msgspec.Raw


class _ErrorText(msgspec.Struct, frozen=True):
    """An exception in a log: the name of its type, and in `wrong` the text of a WrongResult."""

    error: str
    wrong: str | None = None


class DecisionWriter:
    """Writes a log of up to `max_bytes` bytes. All methods raise OSError if a write fails."""

    def __init__(self, file: BufferedWriter, header: Header, max_bytes: int) -> None:
        self._file = file
        # Room is reserved for the empty frame that marks a full log.
        self._num_left = max_bytes - len(MAGIC) - _LENGTH_BYTES
        self.is_full = False
        file.write(MAGIC)
        self._write(_encode(header))

    def record(self, now: float, event: Event, effects: list[Effect]) -> None:
        """Write one event and its effects. Does nothing after the log is full."""
        if not self.is_full:
            self._write(_encode((now, event, effects)))

    def _write(self, content: bytes) -> None:
        self._num_left -= len(content) + _LENGTH_BYTES
        if self._num_left < 0:
            self.is_full, content = True, b""
        self._file.write(len(content).to_bytes(_LENGTH_BYTES, "big"))
        self._file.write(content)


class DecisionReader:
    """Reads a log. All methods raise LogError.

    `is_cut`: whether the log reached its size limit or its writer was killed; valid after the last
    event was read.
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
        """Yield (seconds, event, encoded effects) of each frame."""
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
    """Effects encoded as in a log. Equal effects give equal bytes."""
    return _encode(effects)


def shown_effects(content: bytes) -> list[Any]:
    """Encoded effects as plain lists and dicts, to be printed."""
    return list(msgspec.msgpack.decode(content))


def are_same(recorded: object, replayed: object) -> bool:
    """Whether shown effects are equal. A log of an earlier version lacks the fields of later ones,
    which replays leave null, false or empty.
    """
    if isinstance(recorded, dict) and isinstance(replayed, dict):
        later = [replayed[name] for name in replayed.keys() - recorded.keys()]
        return all(
            value is None or value is False or value in ("", b"", []) for value in later
        ) and all(
            name in replayed and are_same(value, replayed[name]) for name, value in recorded.items()
        )
    if isinstance(recorded, list) and isinstance(replayed, list):
        return len(recorded) == len(replayed) and all(map(are_same, recorded, replayed))
    return type(recorded) is type(replayed) and recorded == replayed


def _plain(value: Any) -> Any:
    """An encodable value for an object that MessagePack cannot encode."""
    if isinstance(value, OperatorFault):
        return [value.node, _plain(value.error)]
    if isinstance(value, Exception):
        wrong = str(value) if isinstance(value, WrongResult) else None
        return _ErrorText(name_of(value), wrong)
    if isinstance(value, Sequence):  # the prompt of a simulation, which makes its tokens when read
        return list(value)
    return {"object": type(value).__name__}  # `Answer.value` from a user's function


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
