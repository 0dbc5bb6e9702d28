"""Kernels that combine the tokens of a sequence: attention of several kinds, and pooling."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, TypeAlias

from sagellm.graphs.ir import TensorType
from sagellm.graphs.kernels.kernel import Kernel, ShapeError, expect_last, kernel

# States are sums over a whole sequence, so they are float32 even in a pool of 16-bit numbers.
_STATE_ITEM_BYTES = 4


@dataclass(frozen=True, slots=True)
class Rope:
    """Rotary position embedding (Su et al. 2021, arXiv:2104.09864) of each head, by halves.

    `scaling` is "default", "linear" or "llama3". "linear" divides all frequencies by `factor`.
    "llama3" (Llama 3.1 release) divides frequencies with a wavelength above original_max_len /
    low_freq_factor by `factor`, keeps frequencies with a wavelength below original_max_len /
    high_freq_factor, and interpolates between the two.
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
    """Writes the key and the value of each row to the row's slot, in one layer of the pool.

    `table`: the number of the block table that the slots belong to.
    """

    layer: int
    num_kv_heads: int
    head_dim: int
    table: int = 0


@dataclass(frozen=True, slots=True)
class RopeKVWrite:
    """Rotates queries and keys as `rope`, and writes rotated keys and values as `kv_write`."""

    layer: int
    num_heads: int
    num_kv_heads: int
    rope: Rope
    table: int = 0


@dataclass(frozen=True, slots=True)
class PagedAttention:
    """Causal softmax(scale * q k) v over the blocks of each row's sequence.

    A row at position p attends to positions max(0, p - window + 1) to p; without a window, 0 to p.
    `table`: the number of the block table that lists the blocks.
    """

    layer: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    scale: float
    window: int | None = None
    table: int = 0


@dataclass(frozen=True, slots=True)
class PackedAttention:
    """softmax(scale * q k) v among the rows of each sequence of the step, which is whole.

    `query_starts`: the first row of each sequence, and the number of rows. `causal`: a row attends
    to itself and to earlier rows alone. `window`: it attends to at most so many of these.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    scale: float
    causal: bool = False
    window: int | None = None


Pooling: TypeAlias = Literal["cls", "mean", "last"]


@dataclass(frozen=True, slots=True)
class PoolRows:
    """One row of each sequence of the step: its first row, the mean of its rows, or its last."""

    mode: Pooling


@dataclass(frozen=True, slots=True)
class LinearAttention:
    """S_t = g_t S_{t-1} + k_t^T v_t and o_t = scale * q_t S_t, for each head and token.

    g_t = sigmoid(gate_t) is one number per head. S is [key_dim, value_dim], and 0 before the first
    token. The recurrence is from retention (Sun et al. 2023, arXiv:2307.08621), and the
    data-dependent scalar gate from Mamba-2 (Dao and Gu 2024, arXiv:2405.21060).

    `states[0]` lists the blocks of the state before the step, and `states[1]` those after the step.
    The kernel uses `num_blocks` blocks of each list, beginning at `first_block`, and in each block
    the layer `layer`.
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


def _paged_attention(
    options: PagedAttention, inlets: Mapping[str, TensorType]
) -> dict[str, TensorType]:
    expect_last(inlets["q"], options.num_heads * options.head_dim, "q")
    if options.num_heads % options.num_kv_heads:
        raise ShapeError(f"{options.num_heads} heads do not share {options.num_kv_heads} KV heads")
    return {"out": inlets["q"]}


def _expect_rows(inlets: Mapping[str, TensorType], rows: str, column: str) -> None:
    if inlets[rows].shape[0] != inlets[column].shape[0]:
        raise ShapeError(f"{rows} is {inlets[rows]}, {column} is {inlets[column]}: rows differ")


def _packed_attention(
    options: PackedAttention, inlets: Mapping[str, TensorType]
) -> dict[str, TensorType]:
    widths = {"q": options.num_heads, "k": options.num_kv_heads, "v": options.num_kv_heads}
    for name, num_heads in widths.items():
        expect_last(inlets[name], num_heads * options.head_dim, name)
        _expect_rows(inlets, "q", name)
    if options.num_heads % options.num_kv_heads:
        raise ShapeError(f"{options.num_heads} heads do not share {options.num_kv_heads} KV heads")
    if options.window is not None and not options.causal:
        raise ShapeError("only causal attention has a window")
    return {"out": inlets["q"]}


def _pool(options: PoolRows, inlets: Mapping[str, TensorType]) -> dict[str, TensorType]:
    rows = inlets["in"]
    return {"out": TensorType(("B", *rows.shape[1:]), rows.dtype)}


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


TOKEN_MIXERS: tuple[Kernel, ...] = (
    kernel("rope", "in positions", "out", Rope, _rope),
    kernel("kv_write", "k v slots kv", "kv", KVWrite, _kv_write),
    kernel("rope_kv_write", "q k v positions slots kv", "q kv", RopeKVWrite, _rope_kv_write),
    kernel(
        "paged_attention",
        "q query_starts context_lens block_tables kv",
        "out kv",
        PagedAttention,
        _paged_attention,
    ),
    kernel("packed_attention", "q k v query_starts", "out", PackedAttention, _packed_attention),
    kernel("pool", "in query_starts", "out", PoolRows, _pool),
    kernel(
        "linear_attention",
        "q k v gate query_starts context_lens states kv",
        "out kv",
        LinearAttention,
        _linear_attention,
    ),
)
