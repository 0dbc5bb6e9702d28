"""A block pool's memory as one tensor."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
import torch
import trio
import xxhash

from sagellm.runtime.engine.port import DamagedBlocks
from sagellm.runtime.kv.shared import SharedBlocks, SharedMemory, is_there, map_shared
from sagellm.runtime.kv.storage import Pairs, Storage

# Copied between two checkpoints: about a millisecond of memory traffic, so that other tasks of the
# thread wait no longer than that.
_CHUNK_BYTES = 4 * 2**20
_MOST_COPIES = 3  # of a chunk that comes damaged

Run: TypeAlias = tuple[slice, slice]  # blocks of the sender, and of the receiver
Bytes: TypeAlias = "np.ndarray[tuple[int, int, int, int], np.dtype[np.uint8]]"


@dataclass(slots=True)
class TensorStorage:
    """`pool` has the shape of `KVLayout.pool_shape`: blocks are its third dimension. `memory` is
    where it lies, if other processes may read it.
    """

    pool: torch.Tensor
    memory: SharedMemory | None = None
    _bytes: Bytes = field(init=False)  # layers, keys and values, blocks, bytes of a block
    _mapped: dict[tuple[int, int, int], Bytes] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        layers, kinds, num_blocks = self.pool.shape[:3]
        self._bytes = self.pool.view(torch.uint8).numpy().reshape(layers, kinds, num_blocks, -1)

    async def receive(self, sender: Storage, pairs: Pairs, check: Callable[[], None]) -> None:
        if not isinstance(sender, TensorStorage):
            raise TypeError(f"tensors receive from tensors, not from {type(sender).__name__}")
        runs = _runs(pairs)
        for layers in self._chunks(len(pairs)):
            check()
            for sent, landed in runs:
                self._bytes[layers, :, landed] = sender._bytes[layers, :, sent]
            await trio.lowlevel.checkpoint()

    async def share(self, blocks: Sequence[int], check: Callable[[], None]) -> SharedBlocks:
        assert self.memory is not None, "this pool's memory is not shared"
        runs, sums = _runs([(block, block) for block in blocks]), []
        for layers in self._chunks(len(blocks)):
            check()
            hashed = xxhash.xxh3_64()
            for kind in self._kinds(self._bytes, layers):
                for run, _ in runs:
                    hashed.update(kind[run].data)
            sums.append(hashed.intdigest())
            await trio.lowlevel.checkpoint()
        return self.memory.tell(blocks, sums)

    async def fetch(
        self, source: SharedBlocks, blocks: Sequence[int], check: Callable[[], None]
    ) -> None:
        sender = self._map(source)
        runs = _runs(list(zip(source.blocks, blocks, strict=True)))
        for layers, wanted in zip(self._chunks(len(blocks)), source.sums, strict=True):
            for _ in range(_MOST_COPIES):
                check()
                found = self._copy(sender, layers, runs)
                await trio.lowlevel.checkpoint()
                if found == wanted:
                    break
            else:
                raise DamagedBlocks(f"{len(blocks)} blocks came damaged {_MOST_COPIES} times")

    def _chunks(self, num_blocks: int) -> Iterator[slice]:
        """The layers, as many at a time as may pass between two checkpoints."""
        num_layers, num_kinds, _, block_bytes = self._bytes.shape
        step = max(1, _CHUNK_BYTES // (num_kinds * num_blocks * block_bytes))
        return (slice(start, start + step) for start in range(0, num_layers, step))

    def _copy(self, source: Bytes, layers: slice, runs: Sequence[Run]) -> int:
        """The checksum of what has arrived: looked at while it is still in the CPU's cache."""
        hashed = xxhash.xxh3_64()
        kinds = zip(self._kinds(source, layers), self._kinds(self._bytes, layers), strict=True)
        for theirs, ours in kinds:
            for sent, landed in runs:
                ours[landed] = theirs[sent]
                hashed.update(ours[landed].data)
        return hashed.intdigest()

    def _kinds(self, pool: Bytes, layers: slice) -> "Iterator[np.ndarray[Any, np.dtype[np.uint8]]]":
        """Keys, then values, of one layer after the other."""
        return (kind for layer in pool[layers] for kind in layer)

    def forget_gone(self) -> None:
        for where in tuple(self._mapped):
            if not is_there(*where):
                del self._mapped[where]

    def _map(self, source: SharedBlocks) -> Bytes:
        """The pool of another process, of our layout: only its number of blocks may differ."""
        where = source.pid, source.descriptor, source.size
        if where not in self._mapped:
            layers, kinds, _, block_bytes = self._bytes.shape
            shared = np.frombuffer(map_shared(*where), dtype=np.uint8)
            self._mapped[where] = shared.reshape(layers, kinds, -1, block_bytes)
        return self._mapped[where]


def _runs(pairs: Pairs) -> list[Run]:
    """The pairs as slices: as long as both blocks rise by one."""
    runs, start = [], 0
    for end in range(1, len(pairs) + 1):
        if end < len(pairs) and all(
            after == before + 1 for before, after in zip(pairs[end - 1], pairs[end], strict=True)
        ):
            continue
        (sent, landed), count = pairs[start], end - start
        runs.append((slice(sent, sent + count), slice(landed, landed + count)))
        start = end
    return runs
