"""The null backend, which computes nothing: its pools have no memory, and its tokens depend on
(seed, choice, position) alone.
"""

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

_MEMORY_BYTES = 1 << 40  # pools store nothing, so that tests may make them as large as they like
_MASK = (1 << 64) - 1  # splitmix64 computes modulo 2**64


def null_token(seed: int, choice: int, position: int, vocab_size: int) -> int:
    """A token that depends on (seed, choice, position) alone, by the mixing steps of splitmix64."""
    mixed = (seed * 0x9E3779B97F4A7C15 + choice * 0xD1B54A32D192ED03 + position + 1) & _MASK
    mixed = ((mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    mixed = ((mixed ^ (mixed >> 27)) * 0x94D049BB133111EB) & _MASK
    return (mixed ^ (mixed >> 31)) % vocab_size


def null_tokens(rows: Sequence[LogitsRow], vocab_size: int) -> list[int]:
    """The null token of each row."""
    return [
        null_token(row.answer.sampling.seed or 0, row.answer.choice, row.num_output, vocab_size)
        for row in rows
    ]


@dataclass(frozen=True, slots=True, weakref_slot=True)
class NullProgram:
    """A program that keeps only the vocabulary size of its graph."""

    vocab_size: int


@dataclass(frozen=True, slots=True)
class NullPool:
    """A pool that has a shape and no bytes: copies do nothing, and reads return nothing."""

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
        return _NO_BUFFERS

    def checksum(self, runs: Runs, layers: range) -> int:
        return 0

    def register(self) -> Region:
        return Region(0, 0)


@dataclass(frozen=True, slots=True)
class _NoBuffers:
    @property
    def views(self) -> list[memoryview]:
        return []

    def commit(self) -> None:
        """Do nothing."""


_NO_BUFFERS = _NoBuffers()


class NullQueue:
    """A queue whose launches have ended when `launch` returns."""

    def launch(self, program: Program, storage: KVStorage, batch: StepBatch) -> Ticket:
        if not isinstance(program, NullProgram):
            raise TypeError(f"null runs programs that it lowered, not {type(program).__name__}")
        ticket: Ticket = Future()
        ticket.set_result(Sampled(null_tokens(batch.rows, program.vocab_size)))
        return ticket

    def close(self) -> None:
        """Do nothing: the queue holds no resource."""


@dataclass(frozen=True, slots=True)
class NullDevice:
    """A device whose `lower` checks the graph and reads its vocabulary size, but no weights."""

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
    """A backend that checks graphs as others do. It reads no weights and imports no torch."""

    name: str = "null"

    @property
    def quantizations(self) -> tuple[str, ...]:
        return ()

    @property
    def kv_cache_dtypes(self) -> tuple[str, ...]:
        return ()

    @property
    def stages(self) -> Mapping[str, Stage]:
        return {"infer": infer}

    def devices(self) -> tuple[str, ...]:
        return (self.name,)

    def device(self, index: int = 0) -> NullDevice:
        return NullDevice(self.devices()[index])


BACKEND = NullBackend()
