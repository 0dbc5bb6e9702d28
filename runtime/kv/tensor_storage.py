"""A block pool's memory as one tensor."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

import numpy as np
import torch
import trio
import xxhash

from sagellm.runtime.engine.port import DamagedBlocks
from sagellm.runtime.kv.shared import SharedBlocks, SharedMemory, map_shared
from sagellm.runtime.kv.storage import Pairs, Storage

# Copied between two checkpoints: about a millisecond of memory traffic, so that other tasks of the
# thread wait no longer than that.
_CHUNK_BYTES = 4 * 2**20
_MOST_COPIES = 3  # of a chunk that comes damaged

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
        for start in range(0, len(pairs), self._chunk):
            check()
            self._copy(sender._bytes, pairs[start : start + self._chunk])
            await trio.lowlevel.checkpoint()

    async def share(self, blocks: Sequence[int]) -> SharedBlocks:
        assert self.memory is not None, "this pool's memory is not shared"
        sums = []
        for chunk in _chunks(blocks, self._chunk):
            sums.append(self._sum(chunk))
            await trio.lowlevel.checkpoint()
        return self.memory.tell(blocks, sums)

    async def fetch(
        self, source: SharedBlocks, blocks: Sequence[int], check: Callable[[], None]
    ) -> None:
        sender = self._map(source)
        chunks = zip(_chunks(source.blocks, self._chunk), _chunks(blocks, self._chunk), strict=True)
        for (sent, landed), wanted in zip(chunks, source.sums, strict=True):
            for _ in range(_MOST_COPIES):
                check()
                self._copy(sender, list(zip(sent, landed, strict=True)))
                found = self._sum(landed)
                await trio.lowlevel.checkpoint()
                if found == wanted:
                    break
            else:
                raise DamagedBlocks(f"{len(sent)} blocks came damaged {_MOST_COPIES} times")

    @property
    def _chunk(self) -> int:
        """Blocks between two checkpoints."""
        return max(1, _CHUNK_BYTES // (self._bytes.nbytes // self._bytes.shape[2]))

    def _copy(self, source: Bytes, pairs: Pairs) -> None:
        for sent, landed in _runs(pairs):
            self._bytes[:, :, landed] = source[:, :, sent]

    def _sum(self, blocks: Sequence[int]) -> int:
        """A checksum of the bytes of these blocks, in order, layer by layer."""
        runs = [landed for _, landed in _runs([(block, block) for block in blocks])]
        hashed = xxhash.xxh3_64()
        for layer in self._bytes:
            for kind in layer:
                for run in runs:
                    hashed.update(kind[run])
        return hashed.intdigest()

    def _map(self, source: SharedBlocks) -> Bytes:
        """The pool of another process, of our layout: only its number of blocks may differ."""
        where = source.pid, source.descriptor, source.size
        if where not in self._mapped:
            self._mapped.clear()  # of processes that may be gone
            layers, kinds, _, block_bytes = self._bytes.shape
            shared = np.frombuffer(map_shared(*where), dtype=np.uint8)
            self._mapped[where] = shared.reshape(layers, kinds, -1, block_bytes)
        return self._mapped[where]


def _chunks(blocks: Sequence[int], size: int) -> Iterator[Sequence[int]]:
    return (blocks[start : start + size] for start in range(0, len(blocks), size))


def _runs(pairs: Pairs) -> Iterator[tuple[slice, slice]]:
    """The pairs as slices: as long as both blocks rise by one."""
    start = 0
    for end in range(1, len(pairs) + 1):
        if end < len(pairs) and all(
            after == before + 1 for before, after in zip(pairs[end - 1], pairs[end], strict=True)
        ):
            continue
        (sent, landed), count = pairs[start], end - start
        yield slice(sent, sent + count), slice(landed, landed + count)
        start = end
