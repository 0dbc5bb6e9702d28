"""What moves blocks from the pool of one worker to that of another; see `transports` for all."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, TypeAlias

from sagellm.runtime.kv.located import Located
from sagellm.runtime.port import DamagedBlocks

Kind: TypeAlias = Literal["memory", "tcp", "nixl"]
MOST_COPIES = 3  # of a chunk that comes damaged


@dataclass(frozen=True, slots=True)
class Sharing:
    """How a pool is shared with other workers: through what, and for tcp on which host."""

    kind: Kind = "memory"
    host: str = "127.0.0.1"


class Transport(Protocol):
    """One worker's end.

    `check` is called before each chunk is touched, without a checkpoint between: it raises
    StaleLease where a lease has gone, so that blocks of somebody else are never read or written.
    `num_damaged` chunks have come other than they were sent, and were asked for again.
    """

    num_damaged: int

    async def offer(self, blocks: Sequence[int], check: Callable[[], None]) -> Located:
        """Where another worker finds those blocks, for as long as `check` does not raise."""

    async def fetch(
        self, source: Located, blocks: Sequence[int], check: Callable[[], None]
    ) -> None:
        """Fill these blocks from where another worker has them, chunk by chunk.

        Raises StaleLease where the lease has ended; DamagedBlocks where a chunk came damaged
        `MOST_COPIES` times, or the worker cannot be reached, or falls silent. Every wait has a
        bound.
        """

    def forget_gone(self) -> None:
        """Let go of what belonged to workers, or leases, that are gone."""

    async def run(self) -> None:
        """Serve other workers until cancelled."""


def damaged(num_blocks: int) -> DamagedBlocks:
    return DamagedBlocks(f"{num_blocks} blocks came damaged {MOST_COPIES} times")
