"""Where a pool's keys and values are, as far as copying between pools needs to know."""

from collections.abc import Callable, Sequence
from typing import Protocol, TypeAlias

from sagellm.runtime.kv.located import Located

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
