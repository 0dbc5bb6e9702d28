"""Root-mean-square norm (Zhang and Sennrich 2019, arXiv:1910.07467), alone and after an add."""

from collections.abc import Mapping
from dataclasses import dataclass

from sagellm.graphs.ir import TensorType
from sagellm.graphs.kernels.kernel import ShapeError, expect_same, kernel


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
