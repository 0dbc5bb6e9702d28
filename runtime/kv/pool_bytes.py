"""A block pool's memory as bytes: chunks that are moved at once, and the runs of blocks in them."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, TypeAlias

import numpy as np
import torch
import trio
import xxhash

from sagellm.runtime.kv.storage import Pairs

# Moved between two checkpoints: about a millisecond of memory traffic, so that other tasks of the
# thread wait no longer than that.
_CHUNK_BYTES = 4 * 2**20

Run: TypeAlias = tuple[slice, slice]  # blocks of the sender, and of the receiver
Bytes: TypeAlias = "np.ndarray[tuple[int, int, int, int], np.dtype[np.uint8]]"


@dataclass(slots=True)
class PoolBytes:
    """`pool` has the shape of `KVLayout.pool_shape`: blocks are its third dimension."""

    pool: torch.Tensor
    array: Bytes = field(init=False)  # layers, keys and values, blocks, bytes of a block

    def __post_init__(self) -> None:
        layers, kinds, num_blocks = self.pool.shape[:3]
        self.array = self.pool.view(torch.uint8).numpy().reshape(layers, kinds, num_blocks, -1)

    @property
    def address(self) -> int:
        return self.pool.data_ptr()

    def like(self, memory: memoryview) -> Bytes:
        """Memory of a pool of the same layout: only its number of blocks may differ."""
        layers, kinds, _, block_bytes = self.array.shape
        return np.frombuffer(memory, dtype=np.uint8).reshape(layers, kinds, -1, block_bytes)

    def chunks(self, num_blocks: int, layers: range | None = None) -> list[range]:
        """All layers, or those, as many at a time as may pass between two checkpoints."""
        num_layers, num_kinds, _, block_bytes = self.array.shape
        layers = range(num_layers) if layers is None else layers
        step = max(1, _CHUNK_BYTES // (num_kinds * num_blocks * block_bytes))
        return [layers[start : start + step] for start in range(0, len(layers), step)]

    def views(self, layers: range, runs: Sequence[slice]) -> list[memoryview]:
        """The bytes of those blocks: of the keys, then the values, of one layer after the other."""
        return [kind[run].data.cast("B") for kind in kinds_of(self.array, layers) for run in runs]

    def sum(self, layers: range, runs: Sequence[slice]) -> int:
        """Their checksum."""
        hashed = xxhash.xxh3_64()
        for view in self.views(layers, runs):
            hashed.update(view)
        return hashed.intdigest()

    async def sums(
        self, blocks: Sequence[int], check: Callable[[], None], layers: range | None
    ) -> tuple[int, ...]:
        """The checksum of each chunk; `check`, `layers` and checkpoints as in Transport."""
        sums, runs = [], slices_of(blocks)
        for chunk in self.chunks(len(blocks), layers):
            check()
            sums.append(self.sum(chunk, runs))
            await trio.lowlevel.checkpoint()
        return tuple(sums)


def kinds_of(pool: Bytes, layers: range) -> "Iterator[np.ndarray[Any, np.dtype[np.uint8]]]":
    """Keys, then values, of one layer after the other."""
    return (kind for layer in pool[layers.start : layers.stop] for kind in layer)


def places_of(
    address: int, shape: Sequence[int], layers: range, runs: Sequence[slice]
) -> list[tuple[int, int]]:
    """Address and size of what `views` gives, in a pool of that shape that begins there."""
    _, num_kinds, num_blocks, block_bytes = shape
    return [
        (
            address + ((layer * num_kinds + kind) * num_blocks + run.start) * block_bytes,
            (run.stop - run.start) * block_bytes,
        )
        for layer in layers
        for kind in range(num_kinds)
        for run in runs
    ]


def slices_of(blocks: Sequence[int]) -> list[slice]:
    """Blocks as slices: as long as they rise by one."""
    return [run for run, _ in runs_of([(block, block) for block in blocks])]


def runs_of(pairs: Pairs) -> list[Run]:
    """The pairs as slices: as long as both blocks rise by one."""
    if not pairs:
        return []
    blocks = np.array(pairs)
    breaks = np.flatnonzero((np.diff(blocks, axis=0) != 1).any(axis=1)) + 1
    bounds = [0, *breaks.tolist(), len(pairs)]
    return [
        (_rising(pairs[start][0], end - start), _rising(pairs[start][1], end - start))
        for start, end in pairwise(bounds)
    ]


def _rising(first: int, count: int) -> slice:
    return slice(first, first + count)
