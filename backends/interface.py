"""The backend contract: devices, KV pools, launch queues, lowering; and backends by name."""

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from typing import TYPE_CHECKING, Protocol, TypeAlias, cast

import msgspec

from sagellm.backends.quantised_weight import QuantisedWeight
from sagellm.backends.step import KVLayout, StepBatch, Ticket
from sagellm.graphs.ir import Graph
from sagellm.graphs.vocabulary import nearest

if TYPE_CHECKING:
    from sagellm.backends.arrays import Array


class Compiling(msgspec.Struct, frozen=True, tag=True):
    """The C kernels are being compiled, once for each CPU, compiler and version of the sources."""

    compiler: str
    folder: str


class Loading(msgspec.Struct, frozen=True, tag=True):
    """`num_bytes` of a model's `total_bytes` of weights have been read; the last event has all."""

    model: str
    num_bytes: int
    total_bytes: int


ProgressEvent: TypeAlias = Compiling | Loading
Progress: TypeAlias = Callable[[ProgressEvent], None]  # called from the thread that loads


def silent(event: ProgressEvent) -> None:
    """Ignore the event: the default Progress."""


Runs: TypeAlias = Sequence[slice]  # each slice: consecutive block ids of a pool
RunPairs: TypeAlias = Sequence[tuple[slice, slice]]  # (run in the source, run in the target)


@dataclass(frozen=True, slots=True)
class Region:
    """Memory that may be registered for remote reads. `kind`: NIXL's name of the memory type."""

    address: int
    num_bytes: int
    kind: str = "DRAM"
    device_index: int = 0


class StagingBuffers(Protocol):
    """Host buffers that receive blocks. `views` have the order of `KVStorage.read`."""

    @property
    def views(self) -> list[memoryview]: ...

    def commit(self) -> None:
        """Copy the buffers into the pool. Does nothing if the views are the pool's own memory."""
        ...


class KVStorage(Protocol):
    """The keys and values of one block pool. Code above the backends reads their bytes only here.

    All calls come from one thread and return when they are done. The caller ensures that no running
    launch writes blocks that are read here, or reads blocks that are written here. Bytes in host
    memory are ordered by layer, then keys before values, then by run.
    """

    @property
    def layout(self) -> KVLayout: ...

    @property
    def num_blocks(self) -> int: ...

    def copy(self, source: "KVStorage", pairs: RunPairs, layers: range) -> None:
        """Copy blocks from a pool of the same backend and layout, on this or another device.

        Raises TypeError for a pool of another backend.
        """
        ...

    def receive(self, memory: memoryview, pairs: RunPairs, layers: range) -> int:
        """Copy blocks from host `memory` that holds a whole pool of the same layout. Returns the
        checksum (XXH3, 64 bits) of the copied bytes.
        """
        ...

    def read(self, runs: Runs, layers: range) -> list[memoryview]:
        """The bytes of blocks, as views of the pool's memory or of a copy that the views own."""
        ...

    def stage(self, runs: Runs, layers: range) -> StagingBuffers:
        """Buffers for the incoming bytes of blocks; their `commit` writes the bytes to the pool."""
        ...

    def checksum(self, runs: Runs, layers: range) -> int:
        """The checksum (XXH3, 64 bits) of the bytes that `read` returns."""
        ...

    def register(self) -> Region:
        """The pool's memory region. Its address is constant while the storage lives."""
        ...


def block_addresses(
    address: int, layout: KVLayout, num_blocks: int, runs: Runs, layers: range
) -> list[tuple[int, int]]:
    """Address and size of each piece that `KVStorage.read` returns, for a pool at `address`."""
    block_bytes = layout.block_bytes // (2 * layout.num_layers)  # of keys or values of one layer
    return [
        (
            address + ((layer * 2 + kind) * num_blocks + run.start) * block_bytes,
            (run.stop - run.start) * block_bytes,
        )
        for layer in layers
        for kind in range(2)
        for run in runs
    ]


Stage: TypeAlias = Callable[[Graph], Graph]  # one step of lowering
# Arrays may be views of files, which nobody may write to. The dtype of bfloat16: arrays.py.
Weights: TypeAlias = Mapping[str, "Array | QuantisedWeight"]


class Program(Protocol):
    """A lowered kernel graph with its weights. It computes logits; the queue samples from them.

    `str()` shows the instructions. Several queues of one device may launch the same program.
    Implementations must support weak references, by which engines of the same model share it.
    """

    def __str__(self) -> str: ...


class Queue(Protocol):
    """The launches of one engine, computed in order. All calls come from one thread."""

    def launch(self, program: Program, storage: KVStorage, batch: StepBatch) -> Ticket:
        """Queue a step after the earlier launches; return at once.

        The step writes the keys and values of all new tokens into `storage` and samples a token for
        each row. A sampled token is a function of the row's logits, its tokens and (seed, choice,
        position) alone. Sampled tokens stay on the device for the next launch. The ticket raises
        the errors of the step.
        """
        ...

    def close(self) -> None:
        """Free the queue's resources. The caller calls it after every launch has ended."""
        ...


class Device(Protocol):
    """One device. Calls may block: engines make them from worker threads."""

    @property
    def name(self) -> str:
        """The name in `Backend.devices`."""
        ...

    @property
    def memory_bytes(self) -> int:
        """Free memory that is available to pools."""
        ...

    def allocate(
        self, layout: KVLayout, num_blocks: int, memory: "memoryview | None" = None
    ) -> KVStorage:
        """Allocate a pool of zeros, without touching its pages if possible.

        `memory`: a zeroed buffer of the caller to use for the pool, which other processes may read;
        None: the device allocates.
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
        """Lower a graph to a program with weights and pool in `dtype`. Reads each weight once.

        `quantization`: one of `Backend.quantizations`, for the weights of linear layers; None: keep
        them as stored. `deterministic`: use the same kernels for all batch sizes, so that a row's
        logits have the same bits alone, in a batch and in any chunks of a prompt. `progress`
        receives the events of slow parts. Raises GraphError for an invalid graph, and LoweringError
        for a graph that cannot run on this device.
        """
        ...

    def open_queue(self, threads: int | None = None) -> Queue:
        """Open a queue whose kernels use `threads` host threads; None: one thread per core."""
        ...


class Backend(Protocol):
    """A kind of device, found by its `name`. `stages`: the named steps of lowering, in order."""

    @property
    def name(self) -> str: ...

    @property
    def quantizations(self) -> tuple[str, ...]:
        """The modes of quantisation on load that `Device.lower` accepts."""
        ...

    @property
    def stages(self) -> Mapping[str, Stage]: ...

    def devices(self) -> tuple[str, ...]:
        """The names of the devices of this kind on this machine."""
        ...

    def device(self, index: int = 0) -> Device:
        """The device `devices()[index]`; the same object for each call."""
        ...


class LoweringError(ValueError):
    """This backend cannot run the graph with these weights."""


class LaunchError(RuntimeError):
    """A launch was not computed, because the previous launch (`StepBatch.after`) failed."""


GROUP = "sagellm.backends"
# Modules with a `BACKEND`. A module is imported when its backend is first asked for.
SHIPPED: Mapping[str, str] = {"cpu": "sagellm.backends.cpu", "null": "sagellm.backends.null"}
# A backend's members, all of which `register_backend` requires.
_MEMBERS = ("name", "quantizations", "stages", "devices", "device")
_registered: dict[str, Backend] = {}


class UnknownBackend(ValueError):
    """No backend of that name is installed."""


def register_backend(backend: Backend) -> None:
    """Register a backend, so that engines can name it as their `device`.

    Raises TypeError for an object that lacks a member of Backend, and ValueError for a name that
    another backend has.
    """
    missing = [member for member in _MEMBERS if not hasattr(backend, member)]
    if missing:
        raise TypeError(f"backend {type(backend).__name__} has no {missing[0]}")
    if not backend.name.isidentifier():  # a colon would end the name in `device: NAME:INDEX`
        raise ValueError(f"{backend.name!r} is no name for a backend: use letters, digits and `_`")
    before = _registered.get(backend.name, backend)
    taken = backend.name in SHIPPED or backend.name in _installed()
    if taken or (before != backend and _home(before) != _home(backend)):
        raise ValueError(f"backend {backend.name!r} exists already; choose another name")
    _registered[backend.name] = backend


def _home(backend: Backend) -> tuple[str, str]:
    """The class of a backend. A reloaded module makes an equal class, which may register again."""
    return type(backend).__module__, type(backend).__qualname__


def is_registered_here(name: str) -> bool:
    """Whether `register_backend` added the backend in this process; other processes lack it."""
    return name in _registered


def list_available_backends() -> tuple[str, ...]:
    """The names that `get_backend` knows, in alphabetical order."""
    return tuple(sorted({*SHIPPED, *_registered, *_installed()}))


def get_backend(name: str) -> Backend:
    """The backend of that name; its module is imported on first use. Raises UnknownBackend."""
    if name in SHIPPED:
        return cast(Backend, importlib.import_module(SHIPPED[name]).BACKEND)
    if name in _registered:
        return _registered[name]
    if name in (installed := _installed()):
        return cast(Backend, installed[name].load())
    known = list_available_backends()
    close = nearest(name, known)
    hint = f"did you mean {close!r}?" if close else f"there are {', '.join(known)}"
    raise UnknownBackend(f"no backend {name!r}; {hint}")


def _installed() -> dict[str, EntryPoint]:
    return {entry.name: entry for entry in entry_points(group=GROUP)}
