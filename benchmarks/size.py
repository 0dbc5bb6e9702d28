"""Tokens a second over batch and context: `sagellm bench size`."""

import json
import re
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import psutil
import torch
from cyclopts import App, Parameter

from benchmarks.cells import Cell
from benchmarks.command import run_command
from benchmarks.machine import Limits, cpu_name, describe, measure_limits
from benchmarks.peers.engines import OURS, PEERS
from benchmarks.peers.group import Group
from benchmarks.peers.plan import Subject, subjects
from benchmarks.peers.report import rounded
from benchmarks.shape import Shape
from sagellm.cli.errors import Failure

RESULTS = Path(__file__).parent / "results"
BATCHES = (1, 2, 4, 8, 16, 32, 64)
CONTEXTS = (128, 512, 2048, 8192, 32768)  # tokens of prompt and answer together
MEMORY_SHARE = 0.5  # of free memory, for keys and values
APP = App(name="sagellm bench size", help=__doc__)


@APP.default
def size(
    *,
    model: str = "qwen05",
    row: str = "bf16",
    batches: Annotated[tuple[int, ...], Parameter(negative=())] = BATCHES,
    contexts: Annotated[tuple[int, ...], Parameter(negative=())] = CONTEXTS,
    rounds: int = 1,
    out_tokens: int = 32,
    threads: int = 2,
    spend_s: float = 60.0,
    plot: bool = True,
    output: Path = RESULTS,
) -> None:
    """Measure decoding, draw it, and keep both.

    Parameters
    ----------
    model
        qwen05, llama15m, qwen05-2-layers.
    row
        The format of the weights: bf16, or what the engine's option `quantization` takes.
    batches
        Sequences at a time, may be repeated.
    contexts
        Tokens of a sequence, prompt and answer, may be repeated.
    rounds
        Of each cell.
    out_tokens
        Tokens of each answer.
    threads
        Of the engine.
    spend_s
        A cell whose prefill takes longer even at the machine's limit is left out, and said so.
    plot
        Draw size-MODEL-CPU.png; needs matplotlib (`pip install 'sagellm[plot]'`).
    output
        The folder for size-MODEL-CPU.json and .png.
    """
    known = {name: subject.shape for name, subject in subjects(out_tokens).items()}
    if model not in known:
        raise Failure(f"no model {model!r}", f"there are {', '.join(known)}")
    figure = blank() if plot else None
    torch.set_num_threads(threads)
    limits = measure_limits()
    shape = known[model]
    wanted = [_cell(batch, context, out_tokens) for context in contexts for batch in batches]
    reasons = {cell.name: left_out(cell, shape, limits, spend_s) for cell in wanted}
    kept = tuple(cell for cell in wanted if reasons[cell.name] is None)
    if not kept:
        raise Failure("no cell fits memory and time", "raise --spend-s, or ask for smaller ones")
    record = {
        "command": " ".join(["sagellm bench size", *sys.argv[1:]]),
        "date": datetime.now(UTC).date().isoformat(),
        "machine": describe(),
        "model": model,
        "row": row,
        "unit": "tokens/s, all sequences decoding",
        "cells": _measure(Subject(shape, kept), row, threads, rounds, limits),
        "left_out": {name: why for name, why in reasons.items() if why is not None},
    }
    output.mkdir(parents=True, exist_ok=True)
    file = output / f"size-{model}-{re.sub('[^a-z0-9]+', '-', cpu_name().lower())}.json"
    file.write_text(json.dumps(record, indent=2) + "\n")
    print(table(record))
    if figure is not None:
        draw(record, figure, file.with_suffix(".png"))


def left_out(cell: Cell, shape: Shape, limits: Limits, spend_s: float) -> str | None:
    """The reason why a cell is not measured; None for a cell that is measured."""
    context_len = cell.prompt_len + cell.num_out
    if cell.prompt_len < 1:
        return f"a context of {context_len} has no room for {cell.num_out} tokens out"
    if context_len > shape.max_len:
        return f"the model ends at {shape.max_len} tokens"
    cache_bytes = cell.num_sequences * context_len * shape.kv_bytes_a_token
    free_bytes = MEMORY_SHARE * psutil.virtual_memory().available
    if cache_bytes > free_bytes:
        return f"keys and values take {cache_bytes / 1e9:.1f} GB; {free_bytes / 1e9:.1f} are free"
    flops = cell.num_sequences * shape.prefill_flops(cell.prompt_len)
    fill_s = flops / max(limits.fp32_flops_per_s, limits.bf16_flops_per_s)
    return f"its prefill takes {fill_s:.0f} s at best" if fill_s > spend_s else None


def _cell(batch: int, context_len: int, num_out: int) -> Cell:
    return Cell(f"{batch} x {context_len}", "decode", batch, context_len - num_out, num_out)


def _measure(
    subject: Subject, row: str, threads: int, rounds: int, limits: Limits
) -> list[dict[str, Any]]:
    found = []
    with Group([PEERS[OURS]], subject, row, threads) as group:
        group.prepare()
        with group.noting(OURS):
            group.start(OURS)
            for cell in subject.cells:
                rates = [group.run(OURS, cell, number, 0.0).value for number in range(rounds)]
                found.append(_kept(cell, rates, limits.of(cell, subject.shape)))
                print(f"{cell.name}: {found[-1]['tokens_per_s']} tokens/s", file=sys.stderr)
        if group.failed:
            raise Failure(
                f"sagellm: {group.failed[OURS]}", "see the lines above, or choose another row"
            )
    return found


def _kept(cell: Cell, rates: Sequence[float], limit: float | None) -> dict[str, Any]:
    return {
        "batch": cell.num_sequences,
        "context": cell.prompt_len + cell.num_out,
        "tokens_per_s": rounded(median(rates)),
        "rates": [rounded(rate) for rate in rates],
        "limit": None if limit is None else rounded(limit),
    }


def table(record: dict[str, Any]) -> str:
    """A row for each batch, a column for each context; a dash for a cell that is left out."""
    rates = {(cell["batch"], cell["context"]): cell["tokens_per_s"] for cell in record["cells"]}
    batches, contexts = (sorted({key[place] for key in rates}) for place in (0, 1))
    lines = [f"| batch | {' | '.join(f'{length:,}' for length in contexts)} |"]
    lines.append("|---" * (len(contexts) + 1) + "|")
    for batch in batches:
        shown = [f"{rates[batch, one]:g}" if (batch, one) in rates else "-" for one in contexts]
        lines.append(f"| {batch} | {' | '.join(shown)} |")
    lines += ["", *(f"- {name}: {why}" for name, why in record["left_out"].items())]
    return "\n".join(lines).rstrip()


def blank() -> Any:
    """An empty figure. Raises Failure without matplotlib, before anything is measured."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        fix = "pip install 'sagellm[plot]', or say --no-plot"
        raise Failure("a plot needs matplotlib, which is not installed", fix) from None
    return Figure(figsize=(7, 4.5), layout="constrained")


def draw(record: dict[str, Any], figure: Any, file: Path) -> None:
    """Draw one line for each context over the batch."""
    axes = figure.subplots()
    for context in sorted({cell["context"] for cell in record["cells"]}):
        cells = [cell for cell in record["cells"] if cell["context"] == context]
        batches = [cell["batch"] for cell in cells]
        rates = [cell["tokens_per_s"] for cell in cells]
        axes.plot(batches, rates, marker="o", label=f"context {context:,}")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set(xlabel="sequences at a time", ylabel="tokens/s")
    axes.set_title(f"{record['model']} {record['row']}, {record['machine']['cpu']}")
    axes.legend()
    figure.savefig(file, dpi=120)


if __name__ == "__main__":
    sys.exit(run_command(APP))
