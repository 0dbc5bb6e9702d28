"""Published request traces: when requests came, and how long they were."""

import csv
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import msgspec
from msgspec import Meta

BLOCK_LEN = 512  # tokens that one hash id of a Mooncake trace stands for
_AZURE = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")


class TraceError(ValueError):
    """A trace that cannot be read; the message says where and why."""


class Arrival(msgspec.Struct, frozen=True):
    """One request: seconds since the first, and lengths in tokens.

    Equal `block_ids` of two requests mean equal tokens, from the beginning on: a shared prefix.
    """

    at_s: float
    input_len: int
    output_len: int
    block_ids: tuple[int, ...] = ()


class _Mooncake(msgspec.Struct, frozen=True):
    timestamp: Annotated[float, Meta(ge=0)]  # ms
    input_length: Annotated[int, Meta(ge=1)]
    output_length: Annotated[int, Meta(ge=0)]
    hash_ids: tuple[int, ...] = ()


def read_trace(path: Path) -> list[Arrival]:
    """A trace of Azure's (CSV) or Mooncake's (JSON lines), told apart by its first line.

    Raises TraceError, OSError.
    """
    with path.open(encoding="utf-8", errors="replace", newline="") as file:
        first = file.readline()
        file.seek(0)
        read = _mooncake if first.lstrip().startswith("{") else _azure
        found = sorted(read(file), key=lambda arrival: arrival.at_s)
    if not found:
        raise TraceError("the trace holds no request")
    start_s = found[0].at_s
    return [msgspec.structs.replace(one, at_s=one.at_s - start_s) for one in found]


def _mooncake(lines: Iterable[str]) -> Iterator[Arrival]:
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            read = msgspec.json.decode(line, type=_Mooncake)
        except ValueError as error:
            raise TraceError(f"line {number}: {error}") from None
        yield Arrival(
            read.timestamp / 1e3, read.input_length, max(1, read.output_length), read.hash_ids
        )


def _azure(lines: Iterable[str]) -> Iterator[Arrival]:
    rows = csv.DictReader(lines)
    absent = [name for name in _AZURE if name not in (rows.fieldnames or ())]
    if absent:
        wanted = f"a header with {', '.join(_AZURE)}, or JSON lines"
        raise TraceError(f"line 1: no column {absent[0]}; a trace has {wanted}")
    for row in rows:
        at, *lengths = (row[name] or "" for name in _AZURE)
        try:
            input_len, output_len = map(int, lengths)
            at_s = _utc(datetime.fromisoformat(at.strip())).timestamp()
        except ValueError as error:
            raise TraceError(f"line {rows.line_num}: {error}") from None
        yield Arrival(at_s, max(1, input_len), max(1, output_len))


def _utc(at: datetime) -> datetime:
    """A time without a zone is no time of this machine's zone, where hours come twice or never."""
    return at if at.tzinfo else at.replace(tzinfo=UTC)
