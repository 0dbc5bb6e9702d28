"""Where a pool's keys and values are, as far as copying between pools needs to know."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeAlias

import trio

from sagellm.runtime.kv.shared import SharedBlocks

Pairs: TypeAlias = list[tuple[int, int]]  # (block of the sender, block of the receiver)


class Storage(Protocol):
    """The memory of one block pool."""

    async def receive(self, sender: "Storage", pairs: Pairs, check: Callable[[], None]) -> None:
        """Copy blocks, chunk by chunk, a checkpoint after each.

        `check` is called before each chunk, without a checkpoint between it and the copy: it raises
        where either lease has gone, so that nothing is copied from or to blocks of somebody else.
        """

    async def share(self, blocks: Sequence[int], check: Callable[[], None]) -> SharedBlocks:
        """How another process finds those blocks. Only where the memory is shared; `check` is
        called before each chunk is looked at, as in `receive`.
        """

    def forget_gone(self) -> None:
        """Let go of the memory of processes that are gone."""

    async def fetch(
        self, source: SharedBlocks, blocks: Sequence[int], check: Callable[[], None]
    ) -> None:
        """Copy another process's blocks into these, as `receive` does, and compare checksums.

        Raises StaleLease where that process is gone, DamagedBlocks.
        """


@dataclass(frozen=True, slots=True)
class NullStorage:
    """No memory; a copy takes the time that its bytes take on a link."""

    block_bytes: int
    bytes_per_s: float

    async def receive(self, sender: Storage, pairs: Pairs, check: Callable[[], None]) -> None:
        check()
        await trio.sleep(len(pairs) * self.block_bytes / self.bytes_per_s)

    async def share(self, blocks: Sequence[int], check: Callable[[], None]) -> SharedBlocks:
        await trio.lowlevel.checkpoint()
        check()
        return SharedBlocks(pid=0, descriptor=-1, size=0, blocks=tuple(blocks))

    def forget_gone(self) -> None:
        """There is none."""

    async def fetch(
        self, source: SharedBlocks, blocks: Sequence[int], check: Callable[[], None]
    ) -> None:
        check()
        await trio.sleep(len(blocks) * self.block_bytes / self.bytes_per_s)
