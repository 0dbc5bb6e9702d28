"""Linear attention with a gate a head: a recurrent state in place of keys and values."""

from collections.abc import Mapping
from dataclasses import dataclass

from sagellm.graphs.ir import TensorType
from sagellm.graphs.kernels.kernel import ShapeError, expect_last, kernel

_STATE_ITEM_BYTES = 4  # sums over a whole sequence are kept in float32, whatever the pool's dtype


@dataclass(frozen=True, slots=True)
class LinearAttention:
    """S_t = g_t S_{t-1} + k_t^T v_t and o_t = scale * q_t S_t, for each head and token.

    g_t = sigmoid(gate_t) is one number a head, S is [key_dim, value_dim] and 0 before the first
    token. It is the recurrence of retention (Sun et al. 2023, arXiv:2307.08621) with the
    data-dependent scalar gate of Mamba-2 (Dao and Gu 2024, arXiv:2405.21060).

    The state of a sequence is read from the blocks `first_block` .. `first_block + num_blocks` of
    `states[0]`, and written to the same of `states[1]`, in layer `layer` of those blocks.
    """

    layer: int
    num_heads: int
    key_dim: int
    value_dim: int
    scale: float = 1.0
    first_block: int = 0
    num_blocks: int = 0

    @property
    def state_bytes(self) -> int:
        return self.num_heads * self.key_dim * self.value_dim * _STATE_ITEM_BYTES


def _linear_attention(
    options: LinearAttention, inlets: Mapping[str, TensorType]
) -> dict[str, TensorType]:
    heads = options.num_heads
    widths = {"q": options.key_dim, "k": options.key_dim, "v": options.value_dim, "gate": 1}
    for name, size in widths.items():
        expect_last(inlets[name], heads * size, name)
        if inlets[name].shape[0] != inlets["q"].shape[0]:
            raise ShapeError(f"q is {inlets['q']}, {name} is {inlets[name]}: rows differ")
    return {"out": inlets["v"]}


LINEAR_ATTENTION = kernel(
    "linear_attention",
    "q k v gate query_starts context_lens states kv",
    "out kv",
    LinearAttention,
    _linear_attention,
)
