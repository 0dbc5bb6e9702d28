"""Kernels that compute each row by itself: embeddings, norms, linears, elementwise."""

from collections.abc import Mapping
from dataclasses import dataclass

from sagellm.graphs.ir import TensorType
from sagellm.graphs.kernels.kernel import Infer, ShapeError, expect_last, expect_same, kernel
from sagellm.graphs.vocabulary import NoOptions


@dataclass(frozen=True, slots=True)
class Embedding:
    """`weight` [vocab_size, size], as stored; `dtype` is that of the result."""

    weight: str
    vocab_size: int
    size: int
    dtype: str


def _embedding(options: Embedding, inlets: Mapping[str, TensorType]) -> dict[str, TensorType]:
    ids = inlets["in"]
    if ids.dtype != "int64" or len(ids.shape) != 1:
        raise ShapeError(f"in is {ids}; token ids are int64 [T]")
    return {"out": TensorType((*ids.shape, options.size), options.dtype)}


def _select_rows(_: NoOptions, inlets: Mapping[str, TensorType]) -> dict[str, TensorType]:
    rows, chosen = inlets["in"], inlets["rows"]
    if chosen.dtype != "int64" or len(chosen.shape) != 1:
        raise ShapeError(f"rows is {chosen}; row numbers are int64 [R]")
    return {"out": TensorType((*chosen.shape, *rows.shape[1:]), rows.dtype)}


EMBEDDING = kernel("embedding", "in", "out", Embedding, _embedding)
SELECT_ROWS = kernel("select_rows", "in rows", "out", NoOptions, _select_rows)


@dataclass(frozen=True, slots=True)
class RmsNorm:
    """Normalises every run of `size` elements of a row, so that heads can be normalised too.

    out = in / sqrt(mean(in ** 2) + epsilon) * weight, with `weight` [size]; fp32 inside.
    """

    weight: str
    size: int
    epsilon: float


def _rms_norm(options: RmsNorm, inlets: Mapping[str, TensorType]) -> dict[str, TensorType]:
    kind = inlets["in"]
    width = kind.shape[-1]
    if not isinstance(width, int) or width % options.size:
        raise ShapeError(f"in is {kind}; its last dimension must be a multiple of {options.size}")
    return {"out": kind}


def _add_rms_norm(options: RmsNorm, inlets: Mapping[str, TensorType]) -> dict[str, TensorType]:
    kind = expect_same(inlets)
    return {"sum": kind, **_rms_norm(options, {"in": kind})}


RMS_NORM = kernel("rms_norm", "in", "out", RmsNorm, _rms_norm)
ADD_RMS_NORM = kernel("add_rms_norm", "a b", "sum out", RmsNorm, _add_rms_norm)


@dataclass(frozen=True, slots=True)
class Linear:
    """out = in @ weight.T + bias, with `weight` [out_features, in_features]."""

    weight: str
    in_features: int
    out_features: int
    bias: str | None = None


@dataclass(frozen=True, slots=True)
class FusedLinear:
    """Several linears over the same rows; one entry each. Ungated, in the order of the outlets."""

    weights: tuple[str, ...]
    in_features: int
    out_features: tuple[int, ...]
    biases: tuple[str | None, ...]


def _linear(options: Linear, inlets: Mapping[str, TensorType]) -> dict[str, TensorType]:
    rows = inlets["in"]
    expect_last(rows, options.in_features, "in")
    return {"out": TensorType((*rows.shape[:-1], options.out_features), rows.dtype)}


def _fused(*outlets: str) -> Infer:
    def infer(options: FusedLinear, inlets: Mapping[str, TensorType]) -> dict[str, TensorType]:
        rows = inlets["in"]
        expect_last(rows, options.in_features, "in")
        sizes = zip(outlets, options.out_features, strict=True)
        return {name: TensorType((*rows.shape[:-1], size), rows.dtype) for name, size in sizes}

    return infer


def _gated(options: FusedLinear, inlets: Mapping[str, TensorType]) -> dict[str, TensorType]:
    return {"out": expect_same(_fused("gate", "up")(options, inlets))}


LINEAR = kernel("linear", "in", "out", Linear, _linear)
QKV_LINEAR = kernel("qkv_linear", "in", "q k v", FusedLinear, _fused("q", "k", "v"))
GATE_UP_LINEAR = kernel("gate_up_linear", "in", "gate up", FusedLinear, _fused("gate", "up"))
GATED_LINEAR = kernel("gated_linear", "in", "out", FusedLinear, _gated)  # silu(gate) * up


def _same(_: NoOptions, inlets: Mapping[str, TensorType]) -> dict[str, TensorType]:
    return {"out": expect_same(inlets)}


SILU = kernel("silu", "in", "out", NoOptions, _same)
MUL = kernel("mul", "a b", "out", NoOptions, _same)
ADD = kernel("add", "a b", "out", NoOptions, _same)
SILU_MUL = kernel("silu_mul", "gate up", "out", NoOptions, _same)  # silu(gate) * up
