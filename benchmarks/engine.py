"""The engine against transformers and the machine's limits: `sagellm bench engine`."""

import re
import sys
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import torch
from cyclopts import App, Parameter

from benchmarks.cells import Cell, Engine, Run, cells
from benchmarks.command import run_command
from benchmarks.machine import Limits, cpu_name, describe, measure_limits
from benchmarks.ours import Ours, bench_graph
from benchmarks.overhead import measure_overhead
from benchmarks.peer import Transformers
from benchmarks.report import Runs, measured, table, write
from benchmarks.weights import model_folder
from sagellm.cli.errors import Failure

RESULTS = Path(__file__).parent / "results"
APP = App(name="sagellm bench engine", help=__doc__)


@APP.default
def engine(
    *,
    only: Annotated[tuple[str, ...], Parameter(name="--cells", negative=())] = (),
    rounds: int = 3,
    out_tokens: int = 128,
    threads: int = 2,
    spend_s: float = 60.0,
    peer: bool = True,
    overhead: bool = True,
    output: Path = RESULTS,
) -> None:
    """Measure, print the table, and keep it.

    Parameters
    ----------
    only
        A cell to measure, may be repeated; all unless given: prefill-512, prefill-2048, decode-1,
        batch-16, batch-32.
    rounds
        Rounds of each cell and engine; transformers stops after `spend_s` on a cell.
    out_tokens
        Tokens out of the decode and batch cells.
    threads
        Threads of each engine.
    spend_s
        Seconds after which transformers' decoding is cut short, and its further rounds left out.
    peer
        Measure transformers as well.
    overhead
        Measure what a step costs outside its kernels as well, at batch 32 of two shapes.
    output
        The folder for engine-CPU.json and engine-CPU.md.
    """
    known = {cell.name: cell for cell in cells(out_tokens)}
    if unknown := set(only) - set(known):
        cause = f"no cell {', '.join(sorted(unknown))}"
        raise Failure(cause, f"there are {', '.join(known)}")
    chosen = [known[name] for name in only or known]
    torch.set_num_threads(threads)
    model = model_folder()
    peers: tuple[Engine, ...] = (Transformers(model, spend_s),) if peer else ()
    name = f"engine-{re.sub('[^a-z0-9]+', '-', cpu_name().lower())}"
    with bench_graph(model, threads).open() as session:
        engines = (Ours(session), *peers)
        limits = measure_limits()
        record = _record(limits)
        for cell in chosen:  # write after each cell: all cells together take about twenty minutes
            record["cells"].append(measure(cell, engines, limits, rounds, spend_s))
            write(record, output, name)
    if overhead:
        record["overhead"] = measure_overhead(threads)
        write(record, output, name)
    print(table(record))


def measure(
    cell: Cell, engines: Sequence[Engine], limits: Limits, rounds: int, spend_s: float
) -> dict[str, Any]:
    """Measure one cell, the engines in turn. The others stop early when `spend_s` is used up."""
    runs: Runs = {engine.name: [] for engine in engines}
    spent_s = dict.fromkeys(runs, 0.0)
    for number in range(rounds):
        for engine in engines:
            if engine is engines[0] or number == 0 or spent_s[engine.name] < spend_s:
                started = time.perf_counter()
                runs[engine.name].append(_timed(engine, cell, number))
                spent_s[engine.name] += time.perf_counter() - started
    return measured(cell, runs, limits)


def _timed(engine: Engine, cell: Cell, number: int) -> Run:
    run = engine.run(cell, number)
    print(f"{cell.name} round {number + 1} {engine.name}: {run.total_s:.2f} s", file=sys.stderr)
    return run


def _command(options: list[str]) -> str:
    """The command line without its output folder, which may name the user."""
    kept = list(options)
    if "--output" in kept:
        at = kept.index("--output")
        del kept[at : at + 2]
    return " ".join(["sagellm bench engine", *kept])


def _record(limits: Limits) -> dict[str, Any]:
    return {
        "command": _command(sys.argv[1:]),
        "date": datetime.now(UTC).date().isoformat(),
        "machine": describe(),
        "limits": {
            "read_gb_per_s": round(limits.read_bytes_per_s / 1e9, 1),
            "fp32_gflops": round(limits.fp32_flops_per_s / 1e9, 1),
            "bf16_gflops": round(limits.bf16_flops_per_s / 1e9, 1),
        },
        "cells": [],
    }


if __name__ == "__main__":
    sys.exit(run_command(APP))
