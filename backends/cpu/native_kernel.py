"""A kernel that has two forms: a function on tensors, and an instruction of the native step."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch

from sagellm.backends.cpu.step import Step
from sagellm.graphs.kernels.attention import PagedAttention, Rope


@dataclass(frozen=True, slots=True)
class NativeKernel:
    """Called, it runs on tensors. `fields` are those of its Instruction.

    `widths` are those of its results; by default there is one, as wide as the first inlet. `keep`
    is what pointers among the fields point to.
    """

    run: Callable[..., tuple[torch.Tensor, ...]]
    fields: Mapping[str, int | float | None] = field(default_factory=dict)
    widths: tuple[int, ...] = ()
    keep: object = None
    rope: Rope | None = None
    attention: PagedAttention | None = None

    def __call__(self, step: Step, *inlets: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return self.run(step, *inlets)
