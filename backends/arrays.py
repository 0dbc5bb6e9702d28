"""Arrays of weights and pools: bfloat16 and other dtypes that numpy lacks, and conversions."""

from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

Array: TypeAlias = npt.NDArray[Any]
Floats: TypeAlias = npt.NDArray[np.float32]
Integers: TypeAlias = npt.NDArray[np.int64]
BlockIds: TypeAlias = npt.NDArray[np.int32]


def opaque(name: str, num_bytes: int) -> np.dtype[np.void]:
    """A dtype of which numpy knows the size alone."""
    return np.dtype([(name, f"<u{num_bytes}")])


BFLOAT16 = opaque("bfloat16", 2)
_CONVERTED_AT_ONCE = 1 << 20  # numbers, so that the temporaries stay small


def dtype_name(dtype: np.dtype[Any]) -> str:
    """The name of a dtype: "float32", "bfloat16"."""
    return dtype.names[0] if dtype.names else dtype.name


def to_float32(array: Array) -> Floats:
    """The numbers of an array of floats, bfloat16 included; the array itself if it is float32."""
    if array.dtype != BFLOAT16:
        return array.astype(np.float32, copy=False)
    wide = array.view(np.uint16).astype(np.uint32)
    wide <<= 16
    return wide.view(np.float32)


def to_bfloat16(array: Array) -> Array:
    """The numbers of an array of floats, rounded to nearest even; the array itself if it is
    bfloat16.
    """
    if array.dtype == BFLOAT16:
        return array
    numbers = np.ascontiguousarray(array).reshape(-1)
    rounded = np.empty(numbers.shape, dtype=np.uint16)
    for top in range(0, len(numbers), _CONVERTED_AT_ONCE):
        part = slice(top, top + _CONVERTED_AT_ONCE)
        wide = numbers[part].astype(np.float32)
        bits = wide.view(np.uint32)
        bits += 0x7FFF + ((bits >> 16) & 1)  # wraps for some NaNs, which are set below
        rounded[part] = bits >> 16
        rounded[part][np.isnan(numbers[part])] = 0x7FC0
    return rounded.view(BFLOAT16).reshape(array.shape)
