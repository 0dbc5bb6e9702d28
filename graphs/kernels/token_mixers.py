"""Kernels that combine the tokens of a sequence: paged and linear attention."""

from collections.abc import Mapping
from dataclasses import dataclass

from sagellm.graphs.ir import TensorType
from sagellm.graphs.kernels.kernel import ShapeError, expect_last, kernel


@dataclass(frozen=True, slots=True)
class Rope:
    """Rotary position embedding (Su et al. 2021, arXiv:2104.09864), halves rotated, per head.

    `scaling` is "default"; "linear" (frequencies divided by `factor`); or "llama3": long waves
    divided by `factor`, waves between original_max_len / high_freq_factor and
    original_max_len / low_freq_factor blended (Llama 3.1 release).
    """

    head_dim: int
    theta: float
    scaling: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 1.0
    original_max_len: int = 0


@dataclass(frozen=True, slots=True)
class KVWrite:
    """Writes each row's key and value to its slot of one layer of the pool.

    `table`: of the block tables of each sequence, the one that the slots are of.
    """

    layer: int
    num_kv_heads: int
    head_dim: int
    table: int = 0


@dataclass(frozen=True, slots=True)
class RopeKVWrite:
    """`rope` of queries and keys, and `kv_write` of the rotated keys and the values."""

    layer: int
    num_heads: int
    num_kv_heads: int
    rope: Rope
    table: int = 0


@dataclass(frozen=True, slots=True)
class PagedAttention:
    """Causal softmax(scale * q k) v over the blocks of each row's sequence.

    A row at position p sees positions max(0, p - window + 1) .. p (all before it if no window).
    `table`: which of the block tables of each sequence.
    """

    layer: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    scale: float
    window: int | None = None
    table: int = 0


def _rope(options: Rope, inlets: Mapping[str, TensorType]) -> dict[str, TensorType]:
    width = inlets["in"].shape[-1]
    if not isinstance(width, int) or width % options.head_dim:
        raise ShapeError(f"in is {inlets['in']}; it must hold whole heads of {options.head_dim}")
    _expect_rows(inlets, "in", "positions")
    return {"out": inlets["in"]}


def _kv_write(options: KVWrite, inlets: Mapping[str, TensorType]) -> dict[str, TensorType]:
    for name in ("k", "v"):
        expect_last(inlets[name], options.num_kv_heads * options.head_dim, name)
    _expect_rows(inlets, "k", "slots")
    return {}


def _rope_kv_write(options: RopeKVWrite, inlets: Mapping[str, TensorType]) -> dict[str, TensorType]:
    head_dim = options.rope.head_dim
    expect_last(inlets["q"], options.num_heads * head_dim, "q")
    _expect_rows(inlets, "q", "positions")
    _kv_write(KVWrite(options.layer, options.num_kv_heads, head_dim), inlets)
    return {"q": inlets["q"]}


def _attention(options: PagedAttention, inlets: Mapping[str, TensorType]) -> dict[str, TensorType]:
    expect_last(inlets["q"], options.num_heads * options.head_dim, "q")
    if options.num_heads % options.num_kv_heads:
        raise ShapeError(f"{options.num_heads} heads do not share {options.num_kv_heads} KV heads")
    return {"out": inlets["q"]}


def _expect_rows(inlets: Mapping[str, TensorType], rows: str, column: str) -> None:
    if inlets[rows].shape[0] != inlets[column].shape[0]:
        raise ShapeError(f"{rows} is {inlets[rows]}, {column} is {inlets[column]}: rows differ")


ROPE = kernel("rope", "in positions", "out", Rope, _rope)
KV_WRITE = kernel("kv_write", "k v slots kv", "kv", KVWrite, _kv_write)
ROPE_KV_WRITE = kernel(
    "rope_kv_write", "q k v positions slots kv", "q kv", RopeKVWrite, _rope_kv_write
)
PAGED_ATTENTION = kernel(
    "paged_attention",
    "q query_starts context_lens block_tables kv",
    "out kv",
    PagedAttention,
    _attention,
)


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
