"""The kernel dialect: kernels, rules, type inference, and the memory that a kernel graph needs."""

from sagellm.graphs.kernels.dialect import (
    KERNEL_VOCABULARY,
    KERNELS,
    STEP_INPUTS,
    VECTORS,
    infer,
    logits_type,
    result_of,
    verify,
)
from sagellm.graphs.kernels.kernel import KV, Kernel, ShapeError
from sagellm.graphs.kernels.memory_layout import KVBlocks, KVGroup, kv_groups

__all__ = [
    "KERNELS",
    "KERNEL_VOCABULARY",
    "KV",
    "STEP_INPUTS",
    "VECTORS",
    "KVBlocks",
    "KVGroup",
    "Kernel",
    "ShapeError",
    "infer",
    "kv_groups",
    "logits_type",
    "result_of",
    "verify",
]
