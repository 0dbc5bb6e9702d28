"""A block pool's memory as one tensor."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import trio

from sagellm.runtime.kv.storage import Pairs, Storage

# Copied between two checkpoints: about a millisecond of memory traffic, so that other tasks of the
# thread wait no longer than that.
_CHUNK_BYTES = 4 * 2**20


@dataclass(frozen=True, slots=True)
class TensorStorage:
    """`pool` has the shape of `KVLayout.pool_shape`: blocks are its third dimension."""

    pool: torch.Tensor

    async def receive(self, sender: Storage, pairs: Pairs, check: Callable[[], None]) -> None:
        if not isinstance(sender, TensorStorage):
            raise TypeError(f"tensors receive from tensors, not from {type(sender).__name__}")
        block_bytes = self.pool[:, :, 0].nbytes
        step = max(1, _CHUNK_BYTES // block_bytes)
        for start in range(0, len(pairs), step):
            check()
            self._copy(sender.pool, pairs[start : start + step])
            await trio.lowlevel.checkpoint()

    def _copy(self, source: torch.Tensor, pairs: Pairs) -> None:
        sources, targets = zip(*pairs, strict=True)
        self.pool[:, :, list(targets)] = source[:, :, list(sources)]
