"""A block pool's memory in chunks that are moved at once, and blocks as runs that rise by one."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TypeAlias

import numpy as np
import trio

from sagellm.backends import KVStorage
from sagellm.runtime.kv.storage import Pairs

# Moved between two checkpoints: about a millisecond of memory traffic, so that other tasks of the
# thread wait no longer than that.
_CHUNK_BYTES = 4 * 2**20

Run: TypeAlias = tuple[slice, slice]  # blocks of the sender, and of the receiver


@dataclass(frozen=True, slots=True)
class PoolBytes:
    """What transports know of a pool: its storage, and where they let others run."""

    storage: KVStorage

    def chunks(self, num_blocks: int) -> list[range]:
        """All layers, as many at a time as may pass between two checkpoints."""
        layout = self.storage.layout
        layer_bytes = layout.block_bytes // layout.num_layers
        layers = range(layout.num_layers)
        step = max(1, _CHUNK_BYTES // (num_blocks * layer_bytes))
        return [layers[start : start + step] for start in range(0, len(layers), step)]

    async def sums(self, blocks: Sequence[int], check: Callable[[], None]) -> tuple[int, ...]:
        """The checksum of each chunk; `check` and checkpoints as in Transport."""
        sums, runs = [], slices_of(blocks)
        for chunk in self.chunks(len(blocks)):
            check()
            sums.append(self.storage.checksum(runs, chunk))
            await trio.lowlevel.checkpoint()
        return tuple(sums)


def slices_of(blocks: Sequence[int]) -> list[slice]:
    """Blocks as slices: as long as they rise by one."""
    return [run for run, _ in runs_of([(block, block) for block in blocks])]


def runs_of(pairs: Pairs) -> list[Run]:
    """The pairs as slices: as long as both blocks rise by one."""
    if not pairs:
        return []
    blocks = np.array(pairs)
    breaks = np.flatnonzero((np.diff(blocks, axis=0) != 1).any(axis=1)) + 1
    bounds = [0, *map(int, breaks), len(pairs)]
    return [
        (_rising(pairs[start][0], end - start), _rising(pairs[start][1], end - start))
        for start, end in pairwise(bounds)
    ]


def _rising(first: int, count: int) -> slice:
    return slice(first, first + count)
