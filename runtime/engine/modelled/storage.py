"""The storage of a modelled engine: no memory, and copies that take the time of a link."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import trio

from sagellm.runtime.kv.located import Located, SharedBlocks
from sagellm.runtime.kv.storage import Pairs, Storage


@dataclass(frozen=True, slots=True)
class ModelledStorage:
    """Implements Storage. A copy takes as long as its bytes take on a link of `bytes_per_s`."""

    block_bytes: int
    bytes_per_s: float
    num_damaged: int = 0

    async def receive(self, sender: Storage, pairs: Pairs, check: Callable[[], None]) -> None:
        check()
        await trio.sleep(self._seconds(len(pairs)))

    async def share(self, blocks: Sequence[int], check: Callable[[], None]) -> Located:
        await trio.lowlevel.checkpoint()
        check()
        return SharedBlocks(pid=0, descriptor=-1, size=0, blocks=tuple(blocks))

    async def fetch(
        self, source: Located, blocks: Sequence[int], check: Callable[[], None]
    ) -> None:
        check()
        await trio.sleep(self._seconds(len(blocks)))

    def forget_gone(self) -> None:
        """There is nothing to forget."""

    async def serve(self) -> None:
        await trio.sleep_forever()

    def _seconds(self, num_blocks: int) -> float:
        return num_blocks * self.block_bytes / self.bytes_per_s
