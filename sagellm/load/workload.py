"""Workloads: lengths, arrival times and prompts of requests, generated or from a trace."""

import csv
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import UTC, datetime
from functools import lru_cache
from itertools import count, takewhile
from pathlib import Path
from random import Random
from typing import Annotated, Literal, TypeAlias

import msgspec
from msgspec import Meta

BLOCK_LEN = 512  # number of tokens that a hash id of a Mooncake trace stands for
_AZURE = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")


class TraceError(ValueError):
    """The error for an unreadable trace. The message has the line and the cause."""


class PlannedRequest(msgspec.Struct, frozen=True):
    """The plan of one request: `at_s`, seconds after the first request, and lengths in tokens.

    Each of `block_ids` stands for BLOCK_LEN tokens of the prompt: requests whose first block ids
    are equal share a prefix.
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


def read_trace(path: Path) -> list[PlannedRequest]:
    """Read a trace of Azure (CSV) or Mooncake (JSON lines); the first line tells the format.

    The requests are sorted by time, and the first has time 0. Raises TraceError, OSError.
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


def _mooncake(lines: Iterable[str]) -> Iterator[PlannedRequest]:
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            read = msgspec.json.decode(line, type=_Mooncake)
        except ValueError as error:
            raise TraceError(f"line {number}: {error}") from None
        # An answer has at least one token: `max_tokens` 0 is no valid request.
        yield PlannedRequest(
            read.timestamp / 1e3, read.input_length, max(1, read.output_length), read.hash_ids
        )


def _azure(lines: Iterable[str]) -> Iterator[PlannedRequest]:
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
        yield PlannedRequest(at_s, max(1, input_len), max(1, output_len))


def _utc(at: datetime) -> datetime:
    """The time, in UTC if it has no zone. In a local zone, some hours occur twice or never."""
    return at if at.tzinfo else at.replace(tzinfo=UTC)


PromptKind: TypeAlias = Literal["ids", "words"]
_CACHED_BLOCKS = 4096  # 512 items each, about 16 MB in all
_TEXT = """
a about after all also and any as at back be because but by can come could day do even first for
from get give go good have he her him his how if in into it its just know like look make me most my
new no not now of on one only or other our out over people say see she so some take than that the
their them then there these they think this time to two up us use want way we well what when which
who will with work would year you your
"""
_WORDS = _TEXT.split()


class Prompts:
    """Generates prompts from random token ids below `vocab_size`, or from random words.

    A word is one token, or slightly more, in most vocabularies.
    """

    def __init__(self, kind: PromptKind, *, seed: int, vocab_size: int = 256) -> None:
        self._kind = kind
        self._seed = seed
        self._items: Sequence[int] | Sequence[str]
        self._items = range(vocab_size) if kind == "ids" else _WORDS
        self._block: Callable[[int], list[int] | list[str]]
        self._block = lru_cache(_CACHED_BLOCKS)(self._draw_block)

    def make(self, number: int, length: int, block_ids: Sequence[int] = ()) -> str | list[int]:
        """The prompt of request `number`: `length` ids or words. Equal block ids repeat them."""
        items: list[int | str] = []
        for block_id in block_ids[: -(-length // BLOCK_LEN)]:
            items += self._block(block_id)
        missing = length - len(items)
        if missing > 0:
            items += Random(f"{self._seed}/request/{number}").choices(self._items, k=missing)
        return self._whole(items[:length])

    def _whole(self, items: list[int | str]) -> str | list[int]:
        if self._kind == "words":
            return " ".join(map(str, items))
        return [item for item in items if isinstance(item, int)]

    def _draw_block(self, block_id: int) -> list[int] | list[str]:
        draw = Random(f"{self._seed}/block/{block_id}")
        return draw.choices(self._items, k=BLOCK_LEN)  # type: ignore[return-value]


def closed_loop(
    input_len: int, output_len: int, spread: float, seed: int
) -> Iterator[PlannedRequest]:
    """Endless requests with random lengths, for a closed loop. Their times are 0."""
    draw = Random(f"{seed}/lengths")
    for _ in count():
        yield PlannedRequest(0.0, _near(draw, input_len, spread), _near(draw, output_len, spread))


def poisson(arrivals: Iterable[PlannedRequest], rate: float, seed: int) -> Iterator[PlannedRequest]:
    """The requests at the times of a Poisson process with `rate` requests a second.

    As in the process, the first request also comes after a random gap, not at 0.
    """
    draw, at_s = Random(f"{seed}/arrivals"), 0.0
    for arrival in arrivals:
        at_s += draw.expovariate(rate)
        yield PlannedRequest(at_s, arrival.input_len, arrival.output_len)


def replay_trace(
    arrivals: Iterable[PlannedRequest],
    *,
    speedup: float = 1.0,
    max_input_len: int | None = None,
    max_output_len: int | None = None,
) -> Iterator[PlannedRequest]:
    """The requests of a trace, `speedup` times as fast, with lengths clipped to the maxima."""
    for arrival in arrivals:
        yield PlannedRequest(
            arrival.at_s / speedup,
            _clip(arrival.input_len, max_input_len),
            _clip(arrival.output_len, max_output_len),
            arrival.block_ids,
        )


def within(arrivals: Iterable[PlannedRequest], duration_s: float) -> Iterator[PlannedRequest]:
    """The requests whose time is below `duration_s`."""
    return takewhile(lambda arrival: arrival.at_s < duration_s, arrivals)


def _near(draw: Random, length: int, spread: float) -> int:
    """A uniform random length from length * (1 - spread) to length * (1 + spread), at least 1."""
    low, high = round(length * (1 - spread)), round(length * (1 + spread))
    return max(1, draw.randint(low, high))


def _clip(length: int, longest: int | None) -> int:
    return length if longest is None else min(length, longest)
