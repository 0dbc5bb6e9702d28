"""A KV pool in host memory: one array, whose bytes are copied, checksummed and shared in place."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from mmap import MAP_ANONYMOUS, MAP_PRIVATE, mmap
from typing import Any

import numpy as np
import xxhash

from sagellm.backends.arrays import BFLOAT16, Array, dtype_name
from sagellm.backends.cpu.native.library import native_kernels
from sagellm.backends.interface import (
    KVStorage,
    LoweringError,
    Region,
    RunPairs,
    Runs,
    block_addresses,
)
from sagellm.backends.step import KVLayout, head_dim_of

_DTYPES: dict[str, np.dtype[Any]] = {"float32": np.dtype(np.float32), "bfloat16": BFLOAT16}
_POOL_DTYPES = {**_DTYPES, "int8": np.dtype(np.int8)}
_Bytes = np.ndarray[Any, np.dtype[np.uint8]]  # [layers, keys and values, blocks, bytes]


@dataclass(frozen=True, slots=True)
class InPlaceBuffers:
    """Staging buffers that are views of the pool itself."""

    views: list[memoryview]

    def commit(self) -> None:
        """Do nothing: the bytes are in the pool already."""


class CpuStorage:
    """The KVStorage of the CPU: an array `pool` of the shape `KVLayout.pool_shape`."""

    def __init__(self, pool: Array) -> None:
        self.pool = pool
        self.layout = _layout_of(pool)
        self.num_blocks = pool.shape[2]
        self._bytes = _as_blocks(pool.reshape(-1).view(np.uint8), self.layout)

    def copy(self, source: KVStorage, pairs: RunPairs, layers: range) -> None:
        if not isinstance(source, CpuStorage):
            raise TypeError(f"a pool of the cpu copies from another, not from {type(source)}")
        theirs, ours = source._bytes[_slice(layers)], self._bytes[_slice(layers)]
        for sent, received in pairs:
            ours[:, :, received] = theirs[:, :, sent]

    def receive(self, memory: memoryview, pairs: RunPairs, layers: range) -> int:
        source = _as_blocks(np.frombuffer(memory, dtype=np.uint8), self.layout)
        kernels = native_kernels() if _is_summed_natively(self._bytes.shape[-1]) else None
        if kernels is not None:
            theirs = _places(source, self.layout, [run for run, _ in pairs], layers)
            ours = _places(self._bytes, self.layout, [run for _, run in pairs], layers)
            copies = zip(theirs, ours, strict=True)
            return kernels.copy_sum([(here, there, size) for (here, size), (there, _) in copies])
        hashed = xxhash.xxh3_64()
        for their_kind, our_kind in zip(
            _kinds(source, layers), _kinds(self._bytes, layers), strict=True
        ):
            for sent, received in pairs:
                our_kind[received] = their_kind[sent]
                hashed.update(our_kind[received].data)  # while the bytes are in the CPU's cache
        return hashed.intdigest()

    def read(self, runs: Runs, layers: range) -> list[memoryview]:
        return [kind[run].data.cast("B") for kind in _kinds(self._bytes, layers) for run in runs]

    def stage(self, runs: Runs, layers: range) -> InPlaceBuffers:
        return InPlaceBuffers(self.read(runs, layers))

    def checksum(self, runs: Runs, layers: range) -> int:
        hashed = xxhash.xxh3_64()
        for view in self.read(runs, layers):
            hashed.update(view)
        return hashed.intdigest()

    def register(self) -> Region:
        return Region(self.pool.ctypes.data, self.pool.nbytes)


def allocate(layout: KVLayout, num_blocks: int, memory: memoryview | None = None) -> CpuStorage:
    """Allocate a pool of zeros. Raises LoweringError for an unknown dtype."""
    # Fresh pages of the system are zeros, and take memory only when they are written.
    dtype, flags = stored_dtype(layout.dtype, _POOL_DTYPES), MAP_PRIVATE | MAP_ANONYMOUS
    pages = memory or mmap(-1, num_blocks * layout.block_bytes, flags=flags)
    return CpuStorage(np.frombuffer(pages, dtype=dtype).reshape(layout.pool_shape(num_blocks)))


def stored_dtype(name: str, known: Mapping[str, np.dtype[Any]] = _DTYPES) -> np.dtype[Any]:
    """The dtype named `name`. Raises LoweringError for a name that is not `known`."""
    if name not in known:
        raise LoweringError(f"the cpu backend has no dtype {name!r}; use {' or '.join(known)}")
    return known[name]


def _layout_of(pool: Array) -> KVLayout:
    num_layers, _, _, num_kv_heads, block_size, _ = pool.shape
    head_dim, dtype = head_dim_of(pool), dtype_name(pool.dtype)
    return KVLayout(num_layers, num_kv_heads, head_dim, block_size, dtype)


def _as_blocks(memory: _Bytes, layout: KVLayout) -> _Bytes:
    kind_bytes = layout.block_bytes // (2 * layout.num_layers)
    return memory.reshape(layout.num_layers, 2, -1, kind_bytes)


def _slice(layers: range) -> slice:
    return slice(layers.start, layers.stop)


def _kinds(pool: _Bytes, layers: range) -> Iterator[_Bytes]:
    """For each layer in turn, the layer's keys, then its values."""
    return (kind for layer in pool[_slice(layers)] for kind in layer)


def _places(pool: _Bytes, layout: KVLayout, runs: Runs, layers: range) -> list[tuple[int, int]]:
    """Address and size of each piece of the runs, in the order of `KVStorage.read`."""
    return block_addresses(pool.ctypes.data, layout, pool.shape[2], runs, layers)


def _is_summed_natively(block_bytes: int) -> bool:
    """Whether blocks have a size that `NativeKernels.copy_sum` accepts."""
    return block_bytes % 64 == 0 and block_bytes > 240
