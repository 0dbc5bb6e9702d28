"""A block pool's memory as one tensor."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import trio

from sagellm.runtime.kv.located import Located
from sagellm.runtime.kv.pool_bytes import PoolBytes, runs_of
from sagellm.runtime.kv.storage import Pairs, Storage
from sagellm.runtime.kv.transport import Transport


@dataclass(slots=True)
class TensorStorage:
    """`transport`: how other processes reach the pool, if they may."""

    pool: PoolBytes
    transport: Transport | None = None

    @property
    def num_layers(self) -> int:
        return len(self.pool.array)

    @property
    def num_damaged(self) -> int:
        return self.transport.num_damaged if self.transport is not None else 0

    async def receive(self, sender: Storage, pairs: Pairs, check: Callable[[], None]) -> None:
        if not isinstance(sender, TensorStorage):
            raise TypeError(f"tensors receive from tensors, not from {type(sender).__name__}")
        ours, theirs, runs = self.pool.array, sender.pool.array, runs_of(pairs)
        for layers in self.pool.chunks(len(pairs)):
            check()
            chunk = slice(layers.start, layers.stop)
            for sent, landed in runs:
                ours[chunk, :, landed] = theirs[chunk, :, sent]
            await trio.lowlevel.checkpoint()

    async def share(
        self, blocks: Sequence[int], layers: range, check: Callable[[], None]
    ) -> Located:
        return await self._required.offer(blocks, check, layers)

    async def fetch(
        self, source: Located, blocks: Sequence[int], layers: range, check: Callable[[], None]
    ) -> None:
        await self._required.fetch(source, blocks, check, layers)

    def forget_gone(self) -> None:
        self._required.forget_gone()

    async def serve(self) -> None:
        await self._required.run()

    @property
    def _required(self) -> Transport:
        assert self.transport is not None, "this pool is of one process alone"
        return self.transport
