"""Kernels that work element by element: `silu`, `mul`, `add`, and the fused `silu_mul`."""

from collections.abc import Mapping

from sagellm.graphs.ir import TensorType
from sagellm.graphs.kernels.kernel import expect_same, kernel
from sagellm.graphs.vocabulary import NoOptions


def _same(_: NoOptions, inlets: Mapping[str, TensorType]) -> dict[str, TensorType]:
    return {"out": expect_same(inlets)}


SILU = kernel("silu", "in", "out", NoOptions, _same)
MUL = kernel("mul", "a b", "out", NoOptions, _same)
ADD = kernel("add", "a b", "out", NoOptions, _same)
SILU_MUL = kernel("silu_mul", "gate up", "out", NoOptions, _same)  # silu(gate) * up
