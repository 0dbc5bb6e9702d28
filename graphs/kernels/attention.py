"""Attention over a paged key / value pool: `rope`, `kv_write`, `paged_attention`, fused rope."""

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
