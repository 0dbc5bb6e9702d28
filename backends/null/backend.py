"""A program whose logits are zero; pools have a shape and no memory."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from sagellm.backends.layers_done import LayersDone
from sagellm.backends.progress import Progress, silent
from sagellm.backends.protocol import Stage, Weights
from sagellm.backends.step import KVLayout, StepInputs
from sagellm.graphs.ir import Graph, TensorType
from sagellm.graphs.kernels import infer, logits_type

_MEMORY_BYTES = 1 << 40  # nothing is stored, so a pool may be as large as a test wants


@dataclass(frozen=True, slots=True)
class NullProgram:
    """Knows how wide its logits are, and nothing else."""

    vocab_size: int

    def run(
        self, inputs: StepInputs, pool: torch.Tensor, layers_done: LayersDone | None = None
    ) -> torch.Tensor:
        return torch.zeros(len(inputs.logit_rows), self.vocab_size)


@dataclass(frozen=True, slots=True)
class NullBackend:
    """Checks graphs as the others do, reads no weight, touches no memory."""

    name: str = "null"

    @property
    def quantizations(self) -> tuple[str, ...]:
        return ()

    @property
    def stages(self) -> Mapping[str, Stage]:
        return {"infer": infer}

    def devices(self) -> tuple[str, ...]:
        return ("meta",)

    def memory_bytes(self) -> int:
        return _MEMORY_BYTES

    def allocate_pool(
        self, layout: KVLayout, num_blocks: int, memory: memoryview | None = None
    ) -> torch.Tensor:
        dtype = getattr(torch, layout.dtype)
        return torch.empty(layout.pool_shape(num_blocks), dtype=dtype, device="meta")

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
