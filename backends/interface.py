"""The backend contract: devices, KV pools, launch queues, and lowering a kernel graph."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, TypeAlias

import msgspec

from sagellm.backends.quantised_weight import QuantisedWeight
from sagellm.backends.step import KVLayout, StepBatch, Ticket
from sagellm.graphs.ir import Graph

if TYPE_CHECKING:
    import torch


class Compiling(msgspec.Struct, frozen=True, tag=True):
    """The C kernels are compiled, which happens once for a CPU, a compiler and a version."""

    compiler: str
    folder: str


class Loading(msgspec.Struct, frozen=True, tag=True):
    """So many bytes of a model's weights have been read; the last time `num_bytes` is the total."""

    model: str
    num_bytes: int
    total_bytes: int


ProgressEvent: TypeAlias = Compiling | Loading
Progress: TypeAlias = Callable[[ProgressEvent], None]  # called from the thread that loads


def silent(event: ProgressEvent) -> None:
    """For whom nobody waits."""


Runs: TypeAlias = Sequence[slice]  # of blocks of a pool that follow each other
RunPairs: TypeAlias = Sequence[tuple[slice, slice]]  # runs of the sender and of the receiver


@dataclass(frozen=True, slots=True)
class Region:
    """Memory that may be registered for remote reads. `kind`: as NIXL names it."""

    address: int
    num_bytes: int
    kind: str = "DRAM"
    device_index: int = 0


class StagingBuffers(Protocol):
    """Buffers of the host for blocks that arrive. `views`, in the order of `KVStorage.read`."""

    @property
    def views(self) -> list[memoryview]: ...

    def commit(self) -> None:
        """What is in the views is in the pool afterwards; on a CPU it is there already."""
        ...


class KVStorage(Protocol):
    """The keys and values of one block pool. Nothing above a backend touches their bytes but here.

    All calls come from one thread and return when they are done. The caller sees to it that no
    launch under way writes blocks that are read, or reads blocks that are written. Bytes of the
    host are in one order: layer after layer, in a layer keys then values, of these run after run.
    """

    @property
    def layout(self) -> KVLayout: ...

    @property
    def num_blocks(self) -> int: ...

    def copy(self, source: "KVStorage", pairs: RunPairs, layers: range) -> None:
        """From a pool of the same backend and layout, perhaps of another device. Raises TypeError
        for a pool of another backend.
        """
        ...

    def receive(self, memory: memoryview, pairs: RunPairs, layers: range) -> int:
        """From a pool of the same layout that lies in `memory` of the host; the checksum (XXH3, 64
        bits) of what has arrived.
        """
        ...

    def read(self, runs: Runs, layers: range) -> list[memoryview]:
        """The bytes of blocks: the pool's own memory, or a copy, which the views keep alive."""
        ...

    def stage(self, runs: Runs, layers: range) -> StagingBuffers:
        """Buffers to fill with the bytes of blocks."""
        ...

    def checksum(self, runs: Runs, layers: range) -> int:
        """XXH3, 64 bits, of what `read` gives."""
        ...

    def register(self) -> Region:
        """All of the pool: its address stays the same as long as the storage lives."""
        ...


def block_addresses(
    address: int, layout: KVLayout, num_blocks: int, runs: Runs, layers: range
) -> list[tuple[int, int]]:
    """Address and size of what `KVStorage.read` gives, in a pool that begins at `address`."""
    block_bytes = layout.block_bytes // (2 * layout.num_layers)
    return [
        (
            address + ((layer * 2 + kind) * num_blocks + run.start) * block_bytes,
            (run.stop - run.start) * block_bytes,
        )
        for layer in layers
        for kind in range(2)
        for run in runs
    ]


Stage: TypeAlias = Callable[[Graph], Graph]
Weights: TypeAlias = Mapping[str, "torch.Tensor | QuantisedWeight"]


class Program(Protocol):
    """A lowered kernel graph with its weights; the last thing it does is to sample.

    `str()` shows its instructions. Several queues of one device may launch it.
    """

    def __str__(self) -> str: ...


class Queue(Protocol):
    """Launches of one engine, computed in the order in which they were made. From one thread."""

    def launch(self, program: Program, storage: KVStorage, batch: StepBatch) -> Ticket:
        """Begin a step, or queue it after those that were launched before; returns at once.

        It writes the keys and values of all new tokens into `storage`, and samples a token for each
        row, a function of its logits, its tokens and (seed, choice, position) alone. What it
        samples stays on the device for the launch after it. Errors are those of the ticket.
        """
        ...

    def close(self) -> None:
        """Free what the queue needs. Every launch is over."""
        ...


class Device(Protocol):
    """One device. Where calls take long, they are made from threads that may wait."""

    @property
    def name(self) -> str:
        """As `Backend.devices` names it."""
        ...

    @property
    def memory_bytes(self) -> int:
        """Memory that pools could take now."""
        ...

    def allocate(
        self, layout: KVLayout, num_blocks: int, memory: "memoryview | None" = None
    ) -> KVStorage:
        """A pool of zeros, its pages untouched where possible; in the caller's `memory`, which is
        zero and which other processes may read, if given.
        """
        ...

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
    ) -> Program:
        """A program that keeps weights and pool in `dtype`; reads each weight once.

        `quantization`: one of the backend's, for the weights of linears; None: as stored.
        `progress` hears what takes long.

        `deterministic`: one choice of kernel for all batch sizes, so that a row's logits are the
        same bits alone, in a batch and in chunks. Raises GraphError or LoweringError.
        """
        ...

    def open_queue(self, threads: int | None = None) -> Queue:
        """`threads` of the host that its kernels may use; None: as many as there are cores."""
        ...


class Backend(Protocol):
    """A kind of device. `stages`: the named graph-to-graph steps of lowering, in order."""

    @property
    def name(self) -> str: ...

    @property
    def quantizations(self) -> tuple[str, ...]:
        """The modes of quantising weights on load that `Device.lower` takes."""
        ...

    @property
    def stages(self) -> Mapping[str, Stage]: ...

    def devices(self) -> tuple[str, ...]:
        """The devices of this kind on this machine."""
        ...

    def device(self, index: int = 0) -> Device:
        """The device `devices()[index]`; the same object each time."""
        ...


class LoweringError(ValueError):
    """A graph that this backend cannot run with these weights."""


class LaunchError(RuntimeError):
    """A launch that was not computed, because the one that it comes after failed."""
