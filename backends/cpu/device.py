"""The CPU as a backend: its memory, and lowering through named stages."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import prod
from mmap import MAP_ANONYMOUS, MAP_PRIVATE, mmap

import psutil
import torch

from sagellm.backends.cpu.binding import Binding
from sagellm.backends.cpu.native.library import native_kernels
from sagellm.backends.cpu.program import bind
from sagellm.backends.plan import plan
from sagellm.backends.progress import Progress, silent
from sagellm.backends.protocol import LoweringError, Program, Stage, Weights
from sagellm.backends.quantised import MODES
from sagellm.backends.step import KVLayout
from sagellm.graphs.ir import Graph
from sagellm.graphs.kernels import infer
from sagellm.graphs.passes import KERNEL_PASSES, Pass

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True, slots=True)
class CpuBackend:
    """`passes` and `native` say how kernels are fused and whether compiled ones may be used."""

    name: str = "cpu"
    passes: tuple[Pass, ...] = KERNEL_PASSES
    native: bool = True

    @property
    def quantizations(self) -> tuple[str, ...]:
        return tuple(MODES)

    @property
    def stages(self) -> Mapping[str, Stage]:
        fusions: dict[str, Stage] = {step.name: step.apply for step in self.passes}
        return {"activations_float32": activations_float32, **fusions, "infer": infer}

    def devices(self) -> tuple[str, ...]:
        return ("cpu",)

    def memory_bytes(self) -> int:
        return int(psutil.virtual_memory().available)

    def allocate_pool(
        self, layout: KVLayout, num_blocks: int, memory: memoryview | None = None
    ) -> torch.Tensor:
        shape, dtype = layout.pool_shape(num_blocks), _torch_dtype(layout.dtype)
        # Fresh pages of the system are zero, and taken only once they are written; torch.zeros
        # writes them all.
        flags = MAP_PRIVATE | MAP_ANONYMOUS
        pages = memory or mmap(-1, prod(shape) * dtype.itemsize, flags=flags)
        return torch.frombuffer(pages, dtype=dtype).view(shape)

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
        for stage in self.stages.values():
            graph = stage(graph)
        native = native_kernels(progress) if self.native else None
        how = _torch_dtype(dtype), native, deterministic, quantization
        binding = Binding(graph, weights, layout, *how)
        return bind(plan(graph), binding)


def activations_float32(graph: Graph) -> Graph:
    """Activations in float32 whatever the weights are: they are small, and lose no bits."""
    nodes = tuple(
        node.with_attrs(dtype="float32") if node.op == "embedding" else node for node in graph.nodes
    )
    return replace(graph, nodes=nodes)


def _torch_dtype(name: str) -> torch.dtype:
    if name not in _DTYPES:
        raise LoweringError(f"the cpu backend has no dtype {name!r}; use {' or '.join(_DTYPES)}")
    return _DTYPES[name]
