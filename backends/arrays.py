"""Arrays of weights and pools: dtypes that numpy lacks, conversions, and memory in large pages."""

import ctypes
import mmap
from collections.abc import Callable, Iterator
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
LARGE_PAGE = 2 << 20  # bytes
_REGION = 64 << 20  # bytes; those that are never written take no memory
_SMALL_PAGE = 4096
_READ_AT_ONCE = 32 << 20  # bytes of a weight
_PART_ROWS = 64  # whole panels of the kernels of every CPU
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


def empty_in_large_pages(num_elements: int, dtype: np.dtype[Any]) -> Array:
    """Allocate an uninitialised vector in large pages, from which sequential reads are faster.

    The end of the vector, which would not fill a large page, is in small pages to save memory. On a
    system without large pages, the whole vector is in small pages.
    """
    num_bytes = num_elements * dtype.itemsize
    advice = getattr(mmap, "MADV_HUGEPAGE", None)  # Linux
    if num_bytes < LARGE_PAGE or advice is None:
        return np.empty(num_elements, dtype=dtype)
    # Linux makes large pages of private memory alone, unless it is told otherwise.
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    memory = mmap.mmap(-1, num_bytes + LARGE_PAGE, flags=flags)
    start = -_address_of(memory) % LARGE_PAGE
    try:
        memory.madvise(advice, start, num_bytes // LARGE_PAGE * LARGE_PAGE)
    except OSError:  # a Linux without large pages
        return np.empty(num_elements, dtype=dtype)
    return np.frombuffer(memory, dtype=dtype, count=num_elements, offset=start)


class LargePages:
    """Allocates uninitialised vectors that live equally long, one after another in large pages.

    The memory is freed once no vector of a region is left.
    """

    def __init__(self) -> None:
        self._region = np.empty(0, dtype=np.uint8)
        self._used = 0

    def empty(self, num_elements: int, dtype: np.dtype[Any]) -> Array:
        """Allocate a vector that begins at a small page."""
        num_bytes = num_elements * dtype.itemsize
        begin = -(-self._used // _SMALL_PAGE) * _SMALL_PAGE
        if begin + num_bytes > len(self._region):
            size = -(-max(num_bytes, _REGION) // LARGE_PAGE) * LARGE_PAGE
            self._region, begin = empty_in_large_pages(size, np.dtype(np.uint8)), 0
        self._used = begin + num_bytes
        return self._region[begin : self._used].view(dtype)


def row_parts(weight: Array, free: Callable[[], None] | None = None) -> Iterator[slice]:
    """The rows of a weight [N, K] in parts, each a multiple of 64 rows but for the last. `free` is
    called after each part of a large weight.
    """
    row_bytes = weight.shape[1] * weight.itemsize
    step = max(1, _READ_AT_ONCE // (_PART_ROWS * row_bytes)) * _PART_ROWS
    for top in range(0, len(weight), step):
        yield slice(top, top + step)
        if free and len(weight) > step:
            free()


def release_freed_memory() -> None:
    """Return freed memory of C's allocator to the system, where the C library can (glibc).

    The allocator keeps freed memory for later requests: after the start of an engine, tens of
    megabytes that no step needs again.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _address_of(memory: mmap.mmap) -> int:
    return np.frombuffer(memory, dtype=np.uint8).ctypes.data
