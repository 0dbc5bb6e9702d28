"""Every kernel by name, and the ports at the two ends of a kernel graph."""

from sagellm.graphs.ir import EdgeType, TensorType
from sagellm.graphs.kernels.attention import KV_WRITE, PAGED_ATTENTION, ROPE, ROPE_KV_WRITE
from sagellm.graphs.kernels.elementwise import ADD, MUL, SILU, SILU_MUL
from sagellm.graphs.kernels.kernel import KV, Kernel
from sagellm.graphs.kernels.linear import GATE_UP_LINEAR, GATED_LINEAR, LINEAR, QKV_LINEAR
from sagellm.graphs.kernels.linear_attention import LINEAR_ATTENTION
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
        LINEAR_ATTENTION,
    )
}

KERNEL_VOCABULARY = Vocabulary({name: kernel.spec for name, kernel in KERNELS.items()})

# T new tokens, B sequences, M blocks of the longest, R rows of logits, N blocks of a snapshot of
# recurrent states. Where a model has several block tables, `slots` and `block_tables` have those of
# all sequences for the first table, then for the second, and so on.
STEP_INPUTS: dict[str, EdgeType] = {
    "token_ids": TensorType(("T",), "int64"),
    "positions": TensorType(("T",), "int64"),
    "slots": TensorType(("T",), "int64"),
    "query_starts": TensorType(("B+1",), "int64"),
    "context_lens": TensorType(("B",), "int64"),
    "block_tables": TensorType(("B", "M"), "int32"),
    "logit_rows": TensorType(("R",), "int64"),
    "states": TensorType((2, "B", "N"), "int32"),  # read before the step, and written by it
    "kv": KV,
}
STEP_OUTPUTS = ("logits", "kv")
