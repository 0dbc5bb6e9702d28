"""Matrix products with a weight: `linear`, several that read the same rows as one, and gated."""

from collections.abc import Mapping
from dataclasses import dataclass

from sagellm.graphs.ir import TensorType
from sagellm.graphs.kernels.kernel import Infer, expect_last, expect_same, kernel


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
