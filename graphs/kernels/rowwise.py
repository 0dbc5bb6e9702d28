"""Kernels that compute each row by itself: embedding, norms, linear and elementwise kernels."""

from collections.abc import Mapping
from dataclasses import dataclass

from sagellm.graphs.ir import TensorType
from sagellm.graphs.kernels.kernel import (
    Infer,
    Kernel,
    ShapeError,
    expect_last,
    expect_same,
    kernel,
)
from sagellm.graphs.vocabulary import NoOptions


@dataclass(frozen=True, slots=True)
class Embedding:
    """Rows of `weight` [vocab_size, size] by token id, or by another number of each token.

    `dtype`: the dtype of the result. `first`: the row of number 0.
    """

    weight: str
    vocab_size: int
    size: int
    dtype: str
    first: int = 0


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


@dataclass(frozen=True, slots=True)
class RmsNorm:
    """Root-mean-square norm (Zhang and Sennrich 2019, arXiv:1910.07467).

    out = in / sqrt(mean(in ** 2) + epsilon) * weight, with `weight` [size], computed in float32.
    Every `size` consecutive elements of a row are normalised by themselves: the whole row, or each
    head of it.
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


@dataclass(frozen=True, slots=True)
class LayerNorm:
    """Layer norm (Ba et al. 2016, arXiv:1607.06450) of each row.

    out = (in - mean(in)) / sqrt(variance(in) + epsilon) * weight + bias, with `weight` and `bias`
    [size], computed in float32.
    """

    weight: str
    bias: str
    size: int
    epsilon: float


def _layer_norm(options: LayerNorm, inlets: Mapping[str, TensorType]) -> dict[str, TensorType]:
    kind = expect_same(inlets)
    expect_last(kind, options.size, next(iter(inlets)))
    return {"out": kind}


@dataclass(frozen=True, slots=True)
class Linear:
    """out = in @ weight.T + bias, with `weight` [out_features, in_features]."""

    weight: str
    in_features: int
    out_features: int
    bias: str | None = None


@dataclass(frozen=True, slots=True)
class FusedLinear:
    """Several linear layers over the same rows. The entries have the order of the outlets."""

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


def _same(_: NoOptions, inlets: Mapping[str, TensorType]) -> dict[str, TensorType]:
    return {"out": expect_same(inlets)}


ROWWISE: tuple[Kernel, ...] = (
    kernel("embedding", "in", "out", Embedding, _embedding),
    kernel("select_rows", "in rows", "out", NoOptions, _select_rows),
    kernel("rms_norm", "in", "out", RmsNorm, _rms_norm),
    kernel("add_rms_norm", "a b", "sum out", RmsNorm, _add_rms_norm),
    kernel("layer_norm", "in", "out", LayerNorm, _layer_norm),
    kernel("add_layer_norm", "a b", "out", LayerNorm, _layer_norm),
    kernel("unit_norm", "in", "out", NoOptions, _same),  # in / |in|, for each row
    kernel("linear", "in", "out", Linear, _linear),
    kernel("gelu_linear", "in", "out", Linear, _linear),  # gelu(in @ weight.T + bias)
    kernel("qkv_linear", "in", "q k v", FusedLinear, _fused("q", "k", "v")),
    kernel("gate_up_linear", "in", "gate up", FusedLinear, _fused("gate", "up")),
    kernel("gated_linear", "in", "out", FusedLinear, _gated),  # silu(gate) * up
    kernel("silu", "in", "out", NoOptions, _same),
    kernel("gelu", "in", "out", NoOptions, _same),  # by the error function, not by tanh
    kernel("tanh", "in", "out", NoOptions, _same),
    kernel("mul", "a b", "out", NoOptions, _same),
    kernel("add", "a b", "out", NoOptions, _same),
    kernel("silu_mul", "gate up", "out", NoOptions, _same),  # silu(gate) * up
)
