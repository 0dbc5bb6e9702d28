"""The memory of a block pool on a device, and how blocks get from one pool to another."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import trio

from sagellm.runtime.kv.located import Located
from sagellm.runtime.kv.pool_bytes import PoolBytes, runs_of
from sagellm.runtime.kv.storage import Pairs, Storage
from sagellm.runtime.kv.transport import Transport


@dataclass(slots=True)
class DeviceStorage:
    """`transport`: how other processes reach the pool, if they may."""

    pool: PoolBytes
    transport: Transport | None = None

    @property
    def num_damaged(self) -> int:
        return self.transport.num_damaged if self.transport is not None else 0

    async def receive(self, sender: Storage, pairs: Pairs, check: Callable[[], None]) -> None:
        if not isinstance(sender, DeviceStorage):
            raise TypeError(f"devices receive from devices, not from {type(sender).__name__}")
        runs = runs_of(pairs)
        for layers in self.pool.chunks(len(pairs)):
            check()
            self.pool.storage.copy(sender.pool.storage, runs, layers)
            await trio.lowlevel.checkpoint()

    async def share(self, blocks: Sequence[int], check: Callable[[], None]) -> Located:
        return await self._required.offer(blocks, check)

    async def fetch(
        self, source: Located, blocks: Sequence[int], check: Callable[[], None]
    ) -> None:
        await self._required.fetch(source, blocks, check)

    def forget_gone(self) -> None:
        self._required.forget_gone()

    async def serve(self) -> None:
        await self._required.run()

    @property
    def _required(self) -> Transport:
        assert self.transport is not None, "this pool is of one process alone"
        return self.transport
