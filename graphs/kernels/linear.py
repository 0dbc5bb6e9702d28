"""Matrix products with a weight: `linear`, and several that read the same rows as one."""

from collections.abc import Mapping
from dataclasses import dataclass

from sagellm.graphs.ir import TensorType
from sagellm.graphs.kernels.kernel import Infer, expect_last, kernel


@dataclass(frozen=True, slots=True)
class Linear:
    """out = in @ weight.T + bias, with `weight` [out_features, in_features]."""

    weight: str
    in_features: int
    out_features: int
    bias: str | None = None


@dataclass(frozen=True, slots=True)
class FusedLinear:
    """Several linears over the same rows; one entry an outlet, in the order of the outlets."""

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


LINEAR = kernel("linear", "in", "out", Linear, _linear)
QKV_LINEAR = kernel("qkv_linear", "in", "q k v", FusedLinear, _fused("q", "k", "v"))
GATE_UP_LINEAR = kernel("gate_up_linear", "in", "gate up", FusedLinear, _fused("gate", "up"))
