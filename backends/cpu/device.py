"""The CPU as a backend: its one device and the stages of lowering. Imports no torch."""

import importlib
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from sagellm.backends.interface import KVStorage, Program, Progress, Queue, Stage, Weights, silent
from sagellm.backends.quantised_weight import MODES
from sagellm.backends.step import KVLayout
from sagellm.graphs.ir import Graph
from sagellm.graphs.kernels import VECTORS, infer, result_of
from sagellm.graphs.passes import KERNEL_PASSES, Pass

if TYPE_CHECKING:  # graphs are checked without loading numpy
    from sagellm.backends.text_batches import EmbeddingQueue

_MEMORY = Path("/proc/meminfo")


@dataclass(frozen=True, slots=True)
class CpuBackend:
    """The backend `cpu`. `passes`: the kernel fusions; `native`: whether C kernels may be used."""

    name: str = "cpu"
    passes: tuple[Pass, ...] = KERNEL_PASSES
    native: bool = True

    @property
    def quantizations(self) -> tuple[str, ...]:
        return tuple(MODES)

    @property
    def kv_cache_dtypes(self) -> tuple[str, ...]:
        return ("int8",)

    @property
    def stages(self) -> Mapping[str, Stage]:
        fusions: dict[str, Stage] = {step.name: step.apply for step in self.passes}
        # "infer" is last, so that it checks the graph that is bound.
        return {"activations_float32": activations_float32, **fusions, "infer": infer}

    def devices(self) -> tuple[str, ...]:
        return ("cpu",)

    def device(self, index: int = 0) -> "CpuDevice":
        return _device(self, self.devices()[index])


@dataclass(frozen=True, slots=True)
class CpuDevice:
    """The machine's cores and memory. The first call that needs torch imports torch."""

    backend: CpuBackend
    name: str

    @property
    def memory_bytes(self) -> int:
        return _available_bytes()

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
        # Torch alone computes vectors: its threads and those of the C kernels would poll in turn.
        embeds = result_of(graph).inlet == VECTORS
        program: Program = _module("program").lower(
            graph,
            weights,
            layout=layout,
            dtype=dtype,
            deterministic=deterministic,
            quantization=quantization,
            progress=progress,
            is_native=self.backend.native and not embeds,
        )
        return program

    def open_embedding_queue(self, threads: int | None = None) -> "EmbeddingQueue":
        queue: EmbeddingQueue = _module("embedding_queue").CpuEmbeddingQueue(threads)
        return queue

    def open_queue(self, threads: int | None = None) -> Queue:
        queue: Queue = _module("program").CpuQueue(threads, is_native=self.backend.native)
        return queue


@cache
def _device(backend: CpuBackend, name: str) -> CpuDevice:
    return CpuDevice(backend, name)


def _available_bytes() -> int:
    """The memory that programs can get. Only where Linux does not say it, psutil is imported, which
    takes 5 ms.
    """
    with suppress(OSError):
        for line in _MEMORY.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) << 10
    return int(importlib.import_module("psutil").virtual_memory().available)


def _module(name: str) -> ModuleType:
    """Import a module of this backend that needs torch. Checking a graph must not load torch."""
    return importlib.import_module(f"sagellm.backends.cpu.{name}")


def activations_float32(graph: Graph) -> Graph:
    """Keep activations in float32 for weights of any dtype: they are small, and keep all bits."""
    nodes = tuple(
        node.with_attrs(dtype="float32") if node.op == "embedding" else node for node in graph.nodes
    )
    return replace(graph, nodes=nodes)
