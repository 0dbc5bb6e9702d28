"""What a case is, and the numbers that cases share. References are computed in float64."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from native_kernels.calls import Blob, Calls, Results

from sagellm.backends.cpu.native.c_structs import NativeLinear

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Case:
    """Calls, and a function that raises AssertionError if their results are wrong."""

    calls: Calls
    check: Callable[[Results], None]


def random(*shape: int, seed: int = 3) -> Array:
    return np.random.default_rng([seed, *shape]).standard_normal(shape, np.float32)


def bfloat(numbers: Array) -> Array:
    """The bits of bfloat16, rounded to nearest even."""
    bits = np.ascontiguousarray(numbers, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)


def widened(bits: Array) -> Array:
    """The float32 of bits of bfloat16."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def rounded(numbers: Array) -> Array:
    """The numbers rounded to bfloat16, in float32."""
    return widened(bfloat(numbers))


def coded(rows: Array) -> Array:
    """Keys or values [..., size] in 8 bits, as codes.h stores them: [..., size + 2] int8."""
    largest = np.abs(rows).max(-1, keepdims=True)
    scales = bfloat(np.where(largest > 1e-30, largest / np.float32(127), 0))
    wide = widened(scales)
    inverse = np.where(wide > 0, 1 / np.where(wide > 0, wide, 1), 0).astype(np.float32)
    return np.concatenate([np.rint(rows * inverse).astype(np.int8), scales.view(np.int8)], -1)


def decoded(stored: Array) -> Array:
    """The float32 numbers of what `coded` returns."""
    scales = widened(np.ascontiguousarray(stored[..., -2:]).view(np.uint16))
    numbers: Array = stored[..., :-2] * scales
    return numbers


def silu(numbers: Array) -> Array:
    return numbers / (1.0 + np.exp(-numbers.astype(np.float64)))


def close(found: Array, wanted: Array, atol: float, rtol: float = 0.0) -> None:
    np.testing.assert_allclose(found.astype(np.float64), wanted, rtol=rtol, atol=atol)


KINDS = ("float", "bfloat", "pairs")  # in the order of panel.h


def packed_linear(
    calls: Calls,
    weight: Array,
    bias: Array | None,
    kind: str,
    *,
    gated: bool = False,
    threads: int = 3,
) -> Blob:
    """A Linear with a weight [num_cols, k] that sage_pack packs: float32, or bits of bfloat16.

    `kind`: one of KINDS; "tiles": pairs that tiles multiply.
    """
    num_cols, k = weight.shape
    number = KINDS.index("pairs" if kind == "tiles" else kind)
    size = calls.call("sage_packed_bytes", num_cols, k, number)
    packed = calls.allocated(size)
    calls.call("sage_pack", calls.array(weight), number, packed, num_cols, k, threads)
    optional: dict[str, Any] = {"row": f"sage_row_{KINDS[number]}"}
    if bias is not None:
        optional["bias"] = calls.array(bias)
    if gated:
        optional["gated"] = f"sage_gated_{kind}"
    run = f"sage_multiply_{kind}"
    return calls.struct(NativeLinear, run=run, weight=packed, num_cols=num_cols, k=k, **optional)
