"""What a backend is: devices, memory, and the lowering of a kernel graph to a program."""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Protocol, TypeAlias

from sagellm.backends.layers_done import LayersDone
from sagellm.backends.progress import Progress, silent
from sagellm.backends.quantised import QuantisedWeight
from sagellm.backends.step import KVLayout, StepInputs
from sagellm.graphs.ir import Graph

if TYPE_CHECKING:  # graphs are checked, and the null engine runs, without loading torch
    import torch

Stage: TypeAlias = Callable[[Graph], Graph]
Weights: TypeAlias = Mapping[str, "torch.Tensor | QuantisedWeight"]


class Program(Protocol):
    """A lowered kernel graph with its weights; `str()` shows its instructions."""

    def run(
        self, inputs: StepInputs, pool: "torch.Tensor", layers_done: LayersDone | None = None
    ) -> "torch.Tensor":
        """One forward step: writes keys and values into `pool`, returns float32 logits [R, vocab].

        Not reentrant. The result is the caller's. `layers_done` is told of each layer.
        """
        ...


class Backend(Protocol):
    """A kind of device. `stages`: the named graph-to-graph steps of lowering, in order."""

    @property
    def name(self) -> str: ...

    @property
    def quantizations(self) -> tuple[str, ...]:
        """The modes of quantising weights on load that `lower` takes."""
        ...

    @property
    def stages(self) -> Mapping[str, Stage]: ...

    def devices(self) -> tuple[str, ...]:
        """The devices of this kind on this machine, as torch names them."""
        ...

    def memory_bytes(self) -> int:
        """Memory that a pool could take now."""
        ...

    def allocate_pool(
        self, layout: KVLayout, num_blocks: int, memory: "memoryview | None" = None
    ) -> "torch.Tensor":
        """Storage of `layout.pool_shape(num_blocks)`, zero, its pages untouched where possible; in
        the caller's `memory`, which is zero, if given.
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

        `quantization`: one of `quantizations`, for the weights of linears; None: as stored.
        `progress` hears what takes long.

        `deterministic`: one choice of kernel for all batch sizes, so that a row's logits are the
        same bits alone, in a batch and in chunks. Raises GraphError or LoweringError.
        """
        ...


class LoweringError(ValueError):
    """A graph that this backend cannot run with these weights."""
