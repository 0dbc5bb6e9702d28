"""Where a pool's keys and values are, as far as copying between pools needs to know."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, TypeAlias

import trio

Pairs: TypeAlias = list[tuple[int, int]]  # (block of the sender, block of the receiver)


class Storage(Protocol):
    """The memory of one block pool."""

    async def receive(self, sender: "Storage", pairs: Pairs, check: Callable[[], None]) -> None:
        """Copy blocks, chunk by chunk, a checkpoint after each.

        `check` is called before each chunk, without a checkpoint between it and the copy: it raises
        where either lease has gone, so that nothing is copied from or to blocks of somebody else.
        """
        ...


@dataclass(frozen=True, slots=True)
class NullStorage:
    """No memory; a copy takes the time that its bytes take on a link."""

    block_bytes: int
    bytes_per_s: float

    async def receive(self, sender: Storage, pairs: Pairs, check: Callable[[], None]) -> None:
        check()
        await trio.sleep(len(pairs) * self.block_bytes / self.bytes_per_s)
