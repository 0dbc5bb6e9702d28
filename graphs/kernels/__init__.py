"""The kernel dialect: its vocabulary, the rules that every graph obeys, and type inference."""

from sagellm.graphs.kernels.inference import infer, logits_type
from sagellm.graphs.kernels.kernel import KV, Kernel, ShapeError
from sagellm.graphs.kernels.kv_blocks import KVBlocks
from sagellm.graphs.kernels.kv_groups import KVGroup, kv_groups
from sagellm.graphs.kernels.rules import verify
from sagellm.graphs.kernels.vocabulary import KERNEL_VOCABULARY, KERNELS, STEP_INPUTS

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
