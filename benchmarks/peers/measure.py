"""sagellm beside other engines, each in an environment of its own: `sagellm bench peers`.

For each model and row (the format of the weights) the engines live side by side and take turns; one
that is not asked is stopped. The first run makes the environments and models, which takes half an
hour and 15 GB; llama.cpp and ik_llama.cpp are built from source, in five and eight minutes.
"""

import json
import re
import sys
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import torch
from cyclopts import App, Parameter
from cyclopts.validators import Number

from benchmarks.cells import Cell
from benchmarks.command import run_command
from benchmarks.machine import Bandwidth, Limits, cpu_name, describe, measure_limits
from benchmarks.peers.engines import BYTES_A_WEIGHT, OURS, PEERS, ROWS, Peer
from benchmarks.peers.group import GB, Group
from benchmarks.peers.plan import (
    ERROR,
    MEMORY,
    START,
    Subject,
    subjects,
    too_long,
    weights_and_kv,
)
from benchmarks.peers.report import cell_record, table
from benchmarks.peers.rounds import Found, Rounds
from benchmarks.peers.timing import Figure, error
from benchmarks.shape import Shape
from sagellm.cli.errors import Failure
from sagellm.graphs.vocabulary import nearest

RESULTS = Path(__file__).parents[1] / "results"
APP = App(name="sagellm bench peers", help=__doc__)
Names = tuple[str, ...]


@APP.default
def peers(
    *,
    chosen: Annotated[Names, Parameter(name="--peers", negative=())] = (),
    models: Annotated[Names, Parameter(negative=())] = (),
    rows: Annotated[Names, Parameter(negative=())] = (),
    cells: Annotated[Names, Parameter(negative=())] = (),
    rounds: int = 3,
    out_tokens: int = 128,
    threads: int = 2,
    spend_s: float = 60.0,
    spinning: Annotated[int, Parameter(validator=Number(gte=0))] = 0,
    output: Path = RESULTS,
) -> None:
    """Measure, print the table, and keep it.

    Parameters
    ----------
    chosen
        A peer, may be repeated; all unless given: llama.cpp, ik_llama.cpp, openvino, vllm,
        vllm+zentorch, transformers.
    models
        A model, may be repeated; all unless given: qwen05, llama15m, qwen05-2-layers (the long
        contexts).
    rows
        A format of the weights, may be repeated; all unless given: bf16, int8, w8a8, int4.
    cells
        A cell, may be repeated; all of the model unless given: start-up, prefill-512, prefill-2048,
        ttft-128, decode-1, batch-16, batch-32, peak-memory, logit-error; decode-8k-1 and so on.
    rounds
        Rounds of each cell; a peer leaves out further ones once it has taken `spend_s`.
    out_tokens
        Tokens out of the decode and batch cells.
    threads
        Threads of each engine.
    spend_s
        A cell's share of time: a peer's decoding is cut short behind it, and extrapolated. A long
        context whose prefill alone would take twice as long is left out.
    spinning
        Measure each speed once more in each round, beside this many processes that spin.
    output
        The folder for peers-CPU.json and peers-CPU.md.
    """
    known = subjects(out_tokens)
    every_cell = {cell.name for subject in known.values() for cell in subject.cells}
    others = _chosen("peer", chosen, [name for name in PEERS if name != OURS])
    torch.set_num_threads(threads)
    bandwidth = Bandwidth()
    record: dict[str, Any] = {
        "command": _command(sys.argv[1:]),
        "date": datetime.now(UTC).date().isoformat(),
        "machine": describe(),
        "rounds": rounds,
        "peers": others,
        "spinning": spinning,
        "limits": [],
        "cells": [],
    }
    wanted_cells = set(_chosen("cell", cells, every_cell))
    bench = Bench(
        record=record,
        engines=[PEERS[name] for name in (OURS, *others)],
        rounds=Rounds(bandwidth.measure, rounds, spend_s, spinning),
        threads=threads,
        spend_s=spend_s,
        output=output,
    )
    for row in _chosen("row", rows, ROWS):
        for name in _chosen("model", models, known):
            subject = known[name]
            wanted = [cell for cell in subject.cells if cell.name in wanted_cells]
            if wanted and not (subject.is_long and row != ROWS[0]):
                bench.measure(subject, row, wanted)
    print(table(record))


class Bench:
    """Fills the record cell by cell, and writes it after each: all cells together take hours."""

    def __init__(
        self,
        *,
        record: dict[str, Any],
        engines: Sequence[Peer],
        rounds: Rounds,
        threads: int,
        spend_s: float,
        output: Path,
    ) -> None:
        self._record = record
        self._engines = engines
        self._rounds = rounds
        self._threads = threads
        self._spend_s = spend_s
        self._output = output

    def measure(self, subject: Subject, row: str, cells: Sequence[Cell]) -> None:
        """Measure the cells of one model and row, with all its engines alive."""
        engines = [one for one in self._engines if one.reads_long or not subject.is_long]
        exact = self._exact(subject) if ERROR in cells else None
        with Group(engines, subject, row, self._threads) as group:
            group.prepare()
            if START not in cells:
                self._start(group)
            for cell in cells:
                limits = self._limits(subject, row, cell)
                left_out = too_long(cell, subject.shape, limits, self._spend_s)
                if cell.kind == "decode" and left_out:
                    self._keep(group, cell, Found({}), None, left_out)
                else:
                    limit = _limit(limits, subject.shape, row, cell, cells)
                    self._keep(group, cell, self._found(group, cell, exact), limit)

    def _found(self, group: Group, cell: Cell, exact: Sequence[float] | None) -> Found:
        if cell is MEMORY:
            return Found({name: [group.memory(name)] for name in group.names})
        if cell is ERROR:
            return _errors(group, exact)
        return self._rounds.measure(group, cell)

    def _start(self, group: Group) -> None:
        for name in group.names:
            with group.noting(name):
                group.start(name)

    def _limits(self, subject: Subject, row: str, cell: Cell) -> Limits:
        limits = measure_limits()
        read, fp32 = limits.read_bytes_per_s / 1e9, limits.fp32_flops_per_s / 1e9
        bf16 = limits.bf16_flops_per_s / 1e9
        named = f"{subject.shape.name} {row} {cell.name}"
        print(
            f"{named}: reads {read:.1f} GB/s, multiplies {fp32:.0f} GFLOP/s in fp32 and "
            f"{bf16:.0f} in bf16",
            file=sys.stderr,
        )
        measured = {"read_gb_per_s": read, "fp32_gflops": fp32, "bf16_gflops": bf16}
        self._record["limits"].append(
            {"before": named, **{name: round(value, 1) for name, value in measured.items()}}
        )
        return limits

    def _exact(self, subject: Subject) -> list[float] | None:
        """The log probabilities of transformers in float32; None if it fails."""
        reference = PEERS["transformers"]
        group = Group([reference], subject, "fp32", self._threads)
        with group, group.noting(reference.name):
            group.start(reference.name)
            return group.logprobs(reference.name)
        return None

    def _keep(
        self, group: Group, cell: Cell, found: Found, limit: float | None, left_out: str = ""
    ) -> None:
        name, row = group.subject.shape.name, group.row
        kept = cell_record(cell, name, row, found, group.failed, limit)
        kept["idle_cpu_share"] = dict(group.idle_shares)
        if left_out:
            kept["left_out"] = left_out
        self._record["cells"].append(kept)
        self._output.mkdir(parents=True, exist_ok=True)
        file = self._output / f"peers-{re.sub('[^a-z0-9]+', '-', cpu_name().lower())}.json"
        file.write_text(json.dumps(self._record, indent=2) + "\n")
        file.with_suffix(".md").write_text(table(self._record))


def _limit(
    limits: Limits, shape: Shape, row: str, cell: Cell, cells: Iterable[Cell]
) -> float | None:
    """The bound for any engine in the unit of the cell; of memory, what all `cells` need."""
    if cell is MEMORY:
        return weights_and_kv(shape, BYTES_A_WEIGHT[row], cells) / GB
    return limits.of(cell, shape, BYTES_A_WEIGHT[row])


def _errors(group: Group, exact: Sequence[float] | None) -> Found:
    """The error of each engine's log probabilities.

    Must be the last cell of a model: an engine without log probabilities fails in it, and ends.
    """
    found = Found({})
    if exact is None:
        return found
    for name in group.names:
        with group.noting(name):
            found.figures[name] = [Figure(error(group.logprobs(name), exact))]
    return found


def _chosen(kind: str, asked: Sequence[str], known: Iterable[str]) -> list[str]:
    """The names in `asked`, or all known ones. Raises Failure for an unknown name."""
    names = list(known)
    for name in asked:
        if name not in names:
            close = nearest(name, names)
            fix = f"did you mean {close}?" if close else f"there are {', '.join(names)}"
            raise Failure(f"no {kind} {name!r}", fix)
    return list(asked) or names


def _command(options: Sequence[str]) -> str:
    """The command line without its output folder, which may name the user."""
    kept = list(options)
    if "--output" in kept:
        at = kept.index("--output")
        del kept[at : at + 2]
    return " ".join(["sagellm bench peers", *kept])


if __name__ == "__main__":
    sys.exit(run_command(APP))
