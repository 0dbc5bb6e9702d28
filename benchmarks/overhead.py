"""The cost of an engine step outside its kernels: `sagellm bench overhead`."""

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from statistics import median
from typing import Annotated, Any

from cyclopts import App, Parameter

from benchmarks.cells import Cell
from benchmarks.command import run_command
from benchmarks.ours import Ours, bench_graph
from benchmarks.shape import LLAMA15M, QWEN05, Shape
from benchmarks.weights import model_folder
from sagellm.backends.cpu.lowerings import CpuProgram
from sagellm.backends.cpu.native.c_structs import NativeStep
from sagellm.backends.cpu.native.library import NativeKernels
from sagellm.cli.errors import Failure

BATCHES = (1, 32)
SHAPES = {shape.name: shape for shape in (QWEN05, LLAMA15M)}
APP = App(name="sagellm bench overhead", help=__doc__)


@dataclass(frozen=True, slots=True)
class Call:
    """One run of the kernels, in clock seconds, with `num_decoding` sequences of one row each."""

    start_s: float
    end_s: float
    num_decoding: int


@contextmanager
def noted_calls() -> Iterator[list[Call]]:
    """Record every run of kernels in this process while the block lasts: of the native step, or of
    a program that calls its kernels one by one.
    """
    calls: list[Call] = []
    native, others = NativeKernels.run_step, CpuProgram.run
    NativeKernels.run_step = _noted(native, calls)  # type: ignore[method-assign]
    CpuProgram.run = _noted(others, calls)  # type: ignore[method-assign]
    try:
        yield calls
    finally:
        NativeKernels.run_step = native  # type: ignore[method-assign]
        CpuProgram.run = others  # type: ignore[method-assign]


def _noted(whole: Callable[..., Any], calls: list[Call]) -> Callable[..., Any]:
    def run(self: Any, step: Any, *others: Any) -> Any:
        start_s = time.perf_counter()
        result = whole(self, step, *others)
        calls.append(Call(start_s, time.perf_counter(), _num_decoding(step)))
        return result

    return run


def _num_decoding(step: Any) -> int:
    """The sequences of a step, NativeStep or StepInputs, if each has one row; else 0."""
    if isinstance(step, NativeStep):
        num_rows, num_sequences = step.num_rows, step.batch.num_sequences
    else:
        num_rows, num_sequences = len(step.token_ids), len(step.query_lens)
    return num_sequences if num_rows == num_sequences else 0


def share_outside(calls: Sequence[Call], num_decoding: int) -> dict[str, float]:
    """The share of a step outside its kernels, over pairs of consecutive decode steps.

    A step lasts from its start to the start of the next; both decode `num_decoding` sequences.
    `outside_ms` is the median; the other figures are of sums. Raises ValueError without such a
    pair.
    """
    pairs = [
        (call, following)
        for call, following in pairwise(calls)
        if call.num_decoding == following.num_decoding == num_decoding
    ]
    if not pairs:
        raise ValueError(f"no two steps in a row decoded {num_decoding} sequences")
    outside_s = [following.start_s - call.end_s for call, following in pairs]
    step_s = sum(following.start_s - call.start_s for call, following in pairs)
    program_s = sum(call.end_s - call.start_s for call, _ in pairs)
    return {
        "num_steps": len(pairs),
        "step_ms": round(1e3 * step_s / len(pairs), 3),
        "program_ms": round(1e3 * program_s / len(pairs), 3),
        "outside_ms": round(1e3 * median(outside_s), 3),
        "share_outside": round(1 - program_s / step_s, 4),
    }


def measure_overhead(
    threads: int, shapes: Sequence[Shape] = (QWEN05, LLAMA15M), rounds: int = 1
) -> list[dict[str, Any]]:
    """One record for each shape and batch, of all rounds together."""
    found = []
    for shape in shapes:
        with bench_graph(model_folder(shape), threads).open() as session:
            ours = Ours(session, shape.vocab_size)
            for batch in BATCHES:
                cell = Cell("overhead", "decode", batch, 32, 32)
                with noted_calls() as calls:
                    for number in range(rounds):
                        ours.run(cell, number)
                outside = share_outside(calls, batch)
                found.append({"model": shape.name, "batch": batch, **outside})
    return found


@APP.default
def overhead(
    *,
    models: Annotated[tuple[str, ...], Parameter(negative=())] = (LLAMA15M.name,),
    rounds: int = 10,
    threads: int = 2,
) -> None:
    """Print the time of a decode step, and its time outside the kernels, at batch 1 and 32.

    Parameters
    ----------
    models
        llama15m or qwen05; may be repeated.
    rounds
        Rounds of 32 steps at each batch.
    threads
        Threads of the kernels.
    """
    if unknown := set(models) - set(SHAPES):
        raise Failure(f"no model {', '.join(sorted(unknown))}", f"there are {', '.join(SHAPES)}")
    print("model     batch  step, ms  kernels, ms  outside, ms (median)")
    for one in measure_overhead(threads, [SHAPES[name] for name in models], rounds):
        times = f"{one['step_ms']:8.3f}  {one['program_ms']:11.3f}  {one['outside_ms']:11.3f}"
        print(f"{one['model']:8}  {one['batch']:5}  {times}")


if __name__ == "__main__":
    sys.exit(run_command(APP))
