"""Workloads: requests that are read or generated, and changed; and their prompts."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import count, islice, takewhile
from math import ceil, floor, inf
from pathlib import Path
from random import Random
from typing import Literal, TypeAlias

from msgspec.structs import replace

from sagellm.load.synthetic import PREFIX, parse_synthetic
from sagellm.load.traces import BLOCK_LEN as BLOCK_LEN
from sagellm.load.traces import PlannedRequest as PlannedRequest
from sagellm.load.traces import TraceError as TraceError
from sagellm.load.traces import read_trace as read_trace

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


def read_workload(source: str) -> list[PlannedRequest]:
    """The requests of a trace (a path) or of a synthetic workload (`synthetic:rate=8,...`).

    Raises TraceError, OSError.
    """
    if source.startswith(PREFIX):
        return list(parse_synthetic(source).generate())
    return read_trace(Path(source))


@dataclass(frozen=True, slots=True)
class Replay:
    """The changes of a workload. They are made in the order of the fields.

    `start_s` and `end_s`: a window; its start becomes time 0. `every`: keep each n-th request.
    `repeat`: play so many times, one after another; the prompts with block ids are the same again.
    `scale_*`: multiply lengths. `max_*`: clip lengths. `speedup`: play so many times as fast.
    """

    start_s: float = 0.0
    end_s: float = inf
    every: int = 1
    repeat: int = 1
    scale_input_len: float = 1.0
    scale_output_len: float = 1.0
    max_input_len: int | None = None
    max_output_len: int | None = None
    speedup: float = 1.0

    def apply(self, requests: Iterable[PlannedRequest]) -> Iterator[PlannedRequest]:
        """The changed requests. `requests` are sorted by time."""
        requests = within((one for one in requests if one.at_s >= self.start_s), self.end_s)
        for planned in _repeated(islice(requests, 0, None, self.every), self.repeat, self.start_s):
            yield replace(
                planned,
                at_s=(planned.at_s - self.start_s) / self.speedup,
                input_len=_clip(
                    _scale(planned.input_len, self.scale_input_len), self.max_input_len
                ),
                output_len=_clip(
                    _scale(planned.output_len, self.scale_output_len), self.max_output_len
                ),
                block_ids=scale_blocks(planned, self.scale_input_len),
            )


def replay_trace(
    arrivals: Iterable[PlannedRequest],
    *,
    speedup: float = 1.0,
    max_input_len: int | None = None,
    max_output_len: int | None = None,
) -> Iterator[PlannedRequest]:
    """The requests of a trace, `speedup` times as fast, with lengths clipped to the maxima."""
    changes = Replay(speedup=speedup, max_input_len=max_input_len, max_output_len=max_output_len)
    return changes.apply(arrivals)


def scale_blocks(planned: PlannedRequest, scale: float) -> tuple[int, ...]:
    """The block ids of a prompt that is `scale` times as long, so that the same share is shared.

    A block takes the id of the last block that it now covers. This needs ids that imply all blocks
    before them, as those of Mooncake do. A prefix that becomes shorter than a block is not shared.
    """
    ids = planned.block_ids
    if scale == 1.0 or not ids:
        return ids
    if len(ids) * BLOCK_LEN >= planned.input_len:
        num = ceil(_scale(planned.input_len, scale) / BLOCK_LEN)
    else:
        num = floor(len(ids) * scale)
    return tuple(ids[min(len(ids), ceil((number + 1) / scale)) - 1] for number in range(num))


def _repeated(
    requests: Iterable[PlannedRequest], times: int, start_s: float
) -> Iterator[PlannedRequest]:
    """The requests, `times` times. Between two rounds passes the mean gap of the requests."""
    if times == 1:
        yield from requests
        return
    kept = list(requests)
    if not kept:
        return
    span_s = kept[-1].at_s - start_s
    span_s += span_s / max(1, len(kept) - 1)
    for turn in range(times):
        yield from (replace(one, at_s=one.at_s + turn * span_s) for one in kept)


def within(arrivals: Iterable[PlannedRequest], duration_s: float) -> Iterator[PlannedRequest]:
    """The requests whose time is below `duration_s`."""
    return takewhile(lambda arrival: arrival.at_s < duration_s, arrivals)


def _near(draw: Random, length: int, spread: float) -> int:
    """A uniform random length from length * (1 - spread) to length * (1 + spread), at least 1."""
    low, high = round(length * (1 - spread)), round(length * (1 + spread))
    return max(1, draw.randint(low, high))


def _scale(length: int, scale: float) -> int:
    return length if scale == 1.0 else max(1, round(length * scale))


def _clip(length: int, longest: int | None) -> int:
    return length if longest is None else min(length, longest)
