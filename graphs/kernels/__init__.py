"""The kernel dialect: its vocabulary, the rules that every graph obeys, and type inference."""

from sagellm.graphs.kernels.dialect import (
    KERNEL_VOCABULARY,
    KERNELS,
    STEP_INPUTS,
    infer,
    logits_type,
    verify,
)
from sagellm.graphs.kernels.kernel import KV, Kernel, ShapeError
from sagellm.graphs.kernels.memory import KVBlocks, KVGroup, kv_groups

__all__ = [
    "KERNELS",
    "KERNEL_VOCABULARY",
    "KV",
    "STEP_INPUTS",
    "KVBlocks",
    "KVGroup",
    "Kernel",
    "ShapeError",
    "infer",
    "kv_groups",
    "logits_type",
    "verify",
]
