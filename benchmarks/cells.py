"""The cells of the result tables, and one run of a cell."""

import random
from dataclasses import dataclass
from typing import Protocol

from benchmarks.shape import QWEN05


@dataclass(frozen=True, slots=True)
class Cell:
    """`num_sequences` requests at once, each with `prompt_len` tokens in and `num_out` tokens out.

    `kind` says what the rate counts: "prefill" (prompt tokens until the first token), "decode"
    (tokens after the first), "batch" (output tokens over the whole time, prefill included).
    """

    name: str
    kind: str
    num_sequences: int
    prompt_len: int
    num_out: int

    def prompts(self, number: int, vocab_size: int = QWEN05.vocab_size) -> list[list[int]]:
        """The prompts of round `number`, random so that no two rounds share a prefix."""
        draw = random.Random(f"{self.name}/{number}")
        lengths = [self.prompt_len] * self.num_sequences
        return [[draw.randrange(vocab_size) for _ in range(length)] for length in lengths]


@dataclass(frozen=True, slots=True)
class Run:
    """The times of one run in seconds. `first_s`: until the first token of the first sequence.

    `num_measured`: the output tokens a sequence that were generated. If the cell asks for more, the
    rest of `total_s` is extrapolated from the last half of the steps.
    """

    first_s: float
    total_s: float
    num_measured: int


class Engine(Protocol):
    """An engine that can run a cell."""

    name: str

    def run(self, cell: Cell, number: int) -> Run: ...


def cells(num_out: int) -> tuple[Cell, ...]:
    """The columns of the table; decode and batch cells generate `num_out` tokens a sequence."""
    return (
        Cell("prefill-512", "prefill", 1, 512, 1),
        Cell("prefill-2048", "prefill", 1, 2048, 1),
        Cell("decode-1", "decode", 1, 128, num_out),
        Cell("batch-16", "batch", 16, 128, num_out),
        Cell("batch-32", "batch", 32, 128, num_out),
    )


def rate(cell: Cell, run: Run) -> float:
    """Tokens a second, counted as the kind of the cell says."""
    if cell.kind == "prefill":
        return cell.num_sequences * cell.prompt_len / run.first_s
    if cell.kind == "decode":
        return (cell.num_out - 1) / (run.total_s - run.first_s)
    return cell.num_sequences * cell.num_out / run.total_s


def whole_run(steps: list[float], num_out: int) -> Run:
    """A run from the times of its steps. Missing steps take as long as the last half did."""
    total_s, missing = steps[-1], num_out - len(steps)
    if missing > 0:
        middle = len(steps) // 2
        total_s += missing * (steps[-1] - steps[middle]) / (len(steps) - 1 - middle)
    return Run(steps[0], total_s, len(steps))
