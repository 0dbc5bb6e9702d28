"""Every kernel by name, and the ports at the two ends of a kernel graph."""

from sagellm.graphs.ir import EdgeType, TensorType
from sagellm.graphs.kernels.attention import KV_WRITE, PAGED_ATTENTION, ROPE, ROPE_KV_WRITE
from sagellm.graphs.kernels.elementwise import ADD, MUL, SILU, SILU_MUL
from sagellm.graphs.kernels.kernel import KV, Kernel
from sagellm.graphs.kernels.linear import GATE_UP_LINEAR, GATED_LINEAR, LINEAR, QKV_LINEAR
from sagellm.graphs.kernels.norm import ADD_RMS_NORM, RMS_NORM
from sagellm.graphs.kernels.rows import EMBEDDING, SELECT_ROWS
from sagellm.graphs.vocabulary import Vocabulary

KERNELS: dict[str, Kernel] = {
    kernel.spec.name: kernel
    for kernel in (
        EMBEDDING,
        RMS_NORM,
        LINEAR,
        ROPE,
        KV_WRITE,
        PAGED_ATTENTION,
        SILU,
        MUL,
        ADD,
        SELECT_ROWS,
        QKV_LINEAR,
        GATE_UP_LINEAR,
        GATED_LINEAR,
        ADD_RMS_NORM,
        SILU_MUL,
        ROPE_KV_WRITE,
    )
}

KERNEL_VOCABULARY = Vocabulary({name: kernel.spec for name, kernel in KERNELS.items()})

# T new tokens, B sequences, M blocks of the longest, R rows of logits.
STEP_INPUTS: dict[str, EdgeType] = {
    "token_ids": TensorType(("T",), "int64"),
    "positions": TensorType(("T",), "int64"),
    "slots": TensorType(("T",), "int64"),
    "query_starts": TensorType(("B+1",), "int64"),
    "context_lens": TensorType(("B",), "int64"),
    "block_tables": TensorType(("B", "M"), "int32"),
    "logit_rows": TensorType(("R",), "int64"),
    "kv": KV,
}
STEP_OUTPUTS = ("logits", "kv")
