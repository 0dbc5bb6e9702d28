"""The cost of an engine step outside its program: scheduling, sampling, emitting, wake-ups."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, TypeAlias

from benchmarks.cells import Cell
from benchmarks.ours import Ours, bench_graph
from benchmarks.shape import LLAMA15M, QWEN05, Shape
from benchmarks.weights import model_folder
from sagellm.backends import StepInputs
from sagellm.backends.arrays import Array, Floats
from sagellm.backends.cpu.lowerings import CpuProgram
from sagellm.backends.cpu.program import NativeProgram

Run: TypeAlias = Callable[..., Floats]

BATCH = 32
CELL = Cell("overhead", "decode", BATCH, 32, 32)


@dataclass(frozen=True, slots=True)
class Call:
    """One run of the program, in clock seconds, with `num_decoding` sequences of one row each."""

    start_s: float
    end_s: float
    num_decoding: int


@contextmanager
def noted_calls() -> Iterator[list[Call]]:
    """Record every run of a program in this process while the block lasts."""
    calls: list[Call] = []
    kinds: tuple[Any, ...] = (NativeProgram, CpuProgram)
    whole = [kind.run for kind in kinds]
    for kind in kinds:
        kind.run = _noted(kind.run, calls)
    try:
        yield calls
    finally:
        for kind, run in zip(kinds, whole, strict=True):
            kind.run = run


def _noted(whole: Run, calls: list[Call]) -> Run:
    def run(self: Any, inputs: StepInputs, pool: Array, threads: int, *more: Any) -> Floats:
        start_s = time.perf_counter()
        logits = whole(self, inputs, pool, threads, *more)
        is_decode = all(length == 1 for length in inputs.query_lens)
        num_decoding = len(inputs.query_lens) if is_decode else 0
        calls.append(Call(start_s, time.perf_counter(), num_decoding))
        return logits

    return run


def share_outside(calls: Sequence[Call], num_decoding: int) -> dict[str, float]:
    """The share of a step outside its program, over pairs of consecutive decode steps.

    A step lasts from its start to the start of the next; both decode `num_decoding` sequences.
    Raises ValueError if there is no such pair.
    """
    pairs = [
        (call, following)
        for call, following in pairwise(calls)
        if call.num_decoding == following.num_decoding == num_decoding
    ]
    if not pairs:
        raise ValueError(f"no two steps in a row decoded {num_decoding} sequences")
    step_s = sum(following.start_s - call.start_s for call, following in pairs)
    program_s = sum(call.end_s - call.start_s for call, _ in pairs)
    return {
        "num_steps": len(pairs),
        "step_ms": round(1e3 * step_s / len(pairs), 3),
        "program_ms": round(1e3 * program_s / len(pairs), 3),
        "share_outside": round(1 - program_s / step_s, 4),
    }


def measure_overhead(threads: int, shapes: Sequence[Shape] = (QWEN05, LLAMA15M)) -> list[Any]:
    """One record for each shape, at batch 32."""
    found = []
    for shape in shapes:
        with (
            bench_graph(model_folder(shape), threads).open() as session,
            noted_calls() as calls,
        ):
            Ours(session, shape.vocab_size).run(CELL, 0)
        found.append({"model": shape.name, "batch": BATCH, **share_outside(calls, BATCH)})
    return found
