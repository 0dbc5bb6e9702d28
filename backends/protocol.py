"""What a backend is: devices, their memory and queues, and lowering a kernel graph to a program."""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Protocol, TypeAlias

from sagellm.backends.kv_storage import KVStorage
from sagellm.backends.progress import Progress, silent
from sagellm.backends.quantised import QuantisedWeight
from sagellm.backends.step import KVLayout, StepBatch, Ticket
from sagellm.graphs.ir import Graph

if TYPE_CHECKING:  # graphs are checked, and the null engine runs, without loading torch
    import torch

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
