"""The CPU as a backend: one device, its memory, and the stages of lowering."""

import importlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from types import ModuleType

import psutil

from sagellm.backends.interface import KVStorage, Program, Progress, Queue, Stage, Weights, silent
from sagellm.backends.quantised_weight import MODES
from sagellm.backends.step import KVLayout
from sagellm.graphs.ir import Graph
from sagellm.graphs.kernels import infer
from sagellm.graphs.passes import KERNEL_PASSES, Pass


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

    def device(self, index: int = 0) -> "CpuDevice":
        return _device(self, self.devices()[index])


@dataclass(frozen=True, slots=True)
class CpuDevice:
    """All of the machine's cores and its memory. Nothing is imported to ask for its size."""

    backend: CpuBackend
    name: str

    @property
    def memory_bytes(self) -> int:
        return int(psutil.virtual_memory().available)

    def allocate(
        self, layout: KVLayout, num_blocks: int, memory: memoryview | None = None
    ) -> KVStorage:
        storage: KVStorage = _module("kv_storage").allocate(layout, num_blocks, memory)
        return storage

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
        for stage in self.backend.stages.values():
            graph = stage(graph)
        program: Program = _module("program").lowered(
            graph,
            weights,
            layout=layout,
            dtype=dtype,
            deterministic=deterministic,
            quantization=quantization,
            progress=progress,
            is_native=self.backend.native,
        )
        return program

    def open_queue(self, threads: int | None = None) -> Queue:
        queue: Queue = _module("queue").CpuQueue(threads)
        return queue


@cache
def _device(backend: CpuBackend, name: str) -> CpuDevice:
    return CpuDevice(backend, name)


def _module(name: str) -> ModuleType:
    """A module of this backend that needs torch: a graph is checked without it."""
    return importlib.import_module(f"sagellm.backends.cpu.{name}")


def activations_float32(graph: Graph) -> Graph:
    """Activations in float32 whatever the weights are: they are small, and lose no bits."""
    nodes = tuple(
        node.with_attrs(dtype="float32") if node.op == "embedding" else node for node in graph.nodes
    )
    return replace(graph, nodes=nodes)
