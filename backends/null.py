"""The null backend: it computes nothing, its pools have no memory, its tokens follow from keys."""

from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass

from sagellm.backends.interface import (
    KVStorage,
    Program,
    Progress,
    Region,
    RunPairs,
    Runs,
    Stage,
    StagingBuffers,
    Weights,
    silent,
)
from sagellm.backends.step import KVLayout, LogitsRow, Sampled, StepBatch, Ticket
from sagellm.graphs.ir import Graph, TensorType
from sagellm.graphs.kernels import infer, logits_type

__all__ = ["BACKEND", "NullBackend"]


_MEMORY_BYTES = 1 << 40  # nothing is stored, so a pool may be as large as a test wants
_MASK = (1 << 64) - 1


def null_token(seed: int, choice: int, position: int, vocab_size: int) -> int:
    """A token that depends on (seed, choice, position) alone: splitmix64's mixing steps."""
    mixed = (seed * 0x9E3779B97F4A7C15 + choice * 0xD1B54A32D192ED03 + position + 1) & _MASK
    mixed = ((mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    mixed = ((mixed ^ (mixed >> 27)) * 0x94D049BB133111EB) & _MASK
    return (mixed ^ (mixed >> 31)) % vocab_size


def null_tokens(rows: Sequence[LogitsRow], vocab_size: int) -> list[int]:
    """One for each row."""
    return [
        null_token(row.answer.sampling.seed or 0, row.answer.choice, row.num_output, vocab_size)
        for row in rows
    ]


@dataclass(frozen=True, slots=True)
class NullProgram:
    """Knows how many tokens there are, and nothing else."""

    vocab_size: int


@dataclass(frozen=True, slots=True)
class NullPool:
    """A shape. Its bytes are none: copies do nothing, and there is nothing to read."""

    layout: KVLayout
    num_blocks: int

    def copy(self, source: KVStorage, pairs: RunPairs, layers: range) -> None:
        if not isinstance(source, NullPool):
            raise TypeError(f"a null pool copies from another, not from {type(source).__name__}")

    def receive(self, memory: memoryview, pairs: RunPairs, layers: range) -> int:
        return 0

    def read(self, runs: Runs, layers: range) -> list[memoryview]:
        return []

    def stage(self, runs: Runs, layers: range) -> StagingBuffers:
        return _NOTHING

    def checksum(self, runs: Runs, layers: range) -> int:
        return 0

    def register(self) -> Region:
        return Region(0, 0)


@dataclass(frozen=True, slots=True)
class _Nothing:
    @property
    def views(self) -> list[memoryview]:
        return []

    def commit(self) -> None:
        """Nothing came."""


_NOTHING = _Nothing()


class NullQueue:
    """Every launch is over at once."""

    def launch(self, program: Program, storage: KVStorage, batch: StepBatch) -> Ticket:
        if not isinstance(program, NullProgram):
            raise TypeError(f"null runs programs that it lowered, not {type(program).__name__}")
        ticket: Ticket = Future()
        ticket.set_result(Sampled(null_tokens(batch.rows, program.vocab_size)))
        return ticket

    def close(self) -> None:
        """There is nothing to free."""


@dataclass(frozen=True, slots=True)
class NullDevice:
    name: str = "null"

    @property
    def memory_bytes(self) -> int:
        return _MEMORY_BYTES

    def allocate(
        self, layout: KVLayout, num_blocks: int, memory: memoryview | None = None
    ) -> NullPool:
        return NullPool(layout, num_blocks)

    def lower(
        self,
        graph: Graph,
        weights: Weights,
        *,
        layout: KVLayout,
        dtype: str,
        deterministic: bool,
        quantization: str | None = None,
        progress: Progress = silent,
    ) -> NullProgram:
        logits = logits_type(infer(graph))
        if not isinstance(logits, TensorType) or not isinstance(logits.shape[-1], int):
            raise TypeError(f"logits of {graph.name} are {logits}")
        return NullProgram(logits.shape[-1])

    def open_queue(self, threads: int | None = None) -> NullQueue:
        return NullQueue()


@dataclass(frozen=True, slots=True)
class NullBackend:
    """Checks graphs as the others do, reads no weight, touches no memory, imports no torch."""

    name: str = "null"

    @property
    def quantizations(self) -> tuple[str, ...]:
        return ()

    @property
    def stages(self) -> Mapping[str, Stage]:
        return {"infer": infer}

    def devices(self) -> tuple[str, ...]:
        return ("null",)

    def device(self, index: int = 0) -> NullDevice:
        return NullDevice(self.devices()[index])


BACKEND = NullBackend()
