"""Where a pool's keys and values are, as far as copying between pools needs to know."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeAlias

import trio

from sagellm.runtime.kv.located import Located, SharedBlocks

Pairs: TypeAlias = list[tuple[int, int]]  # (block of the sender, block of the receiver)


class Storage(Protocol):
    """The memory of one block pool. `num_damaged`: see Transport."""

    @property
    def num_damaged(self) -> int: ...

    async def receive(self, sender: "Storage", pairs: Pairs, check: Callable[[], None]) -> None:
        """Copy blocks, chunk by chunk, a checkpoint after each.

        `check` is called before each chunk, without a checkpoint between it and the copy: it raises
        where either lease has gone, so that nothing is copied from or to blocks of somebody else.
        """

    # What follows is for a pool that other processes reach; see Transport.

    async def share(self, blocks: Sequence[int], check: Callable[[], None]) -> Located: ...

    async def fetch(
        self, source: Located, blocks: Sequence[int], check: Callable[[], None]
    ) -> None: ...

    def forget_gone(self) -> None: ...

    async def serve(self) -> None: ...


@dataclass(frozen=True, slots=True)
class NullStorage:
    """No memory; a copy takes the time that its bytes take on a link."""

    block_bytes: int
    bytes_per_s: float
    num_damaged: int = 0

    async def receive(self, sender: Storage, pairs: Pairs, check: Callable[[], None]) -> None:
        check()
        await trio.sleep(len(pairs) * self.block_bytes / self.bytes_per_s)

    async def share(self, blocks: Sequence[int], check: Callable[[], None]) -> Located:
        await trio.lowlevel.checkpoint()
        check()
        return SharedBlocks(pid=0, descriptor=-1, size=0, blocks=tuple(blocks))

    async def fetch(
        self, source: Located, blocks: Sequence[int], check: Callable[[], None]
    ) -> None:
        check()
        await trio.sleep(len(blocks) * self.block_bytes / self.bytes_per_s)

    def forget_gone(self) -> None:
        """There is none."""

    async def serve(self) -> None:
        await trio.sleep_forever()
