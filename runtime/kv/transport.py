"""The contract of a transport: where blocks are, and how they move between pools."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, TypeAlias

import msgspec

from sagellm.runtime.port import DamagedBlocks


class KVChunk(msgspec.Struct, frozen=True, kw_only=True):
    """Blocks `first` to `end`, without that one, of a prompt, in the tables of full attention.

    What layers with windows and recurrent states remember changes while the prompt is computed: it
    moves at the end.
    """

    first: int
    end: int

    @property
    def num_blocks(self) -> int:
        return self.end - self.first


class SharedBlocks(msgspec.Struct, frozen=True, kw_only=True, tag="shared_blocks"):
    """`blocks`, in order, of the pool of `size` bytes that process `pid` of this host has open as
    `descriptor`. `sums`: a checksum of each chunk of them as it was exported.
    """

    pid: int
    descriptor: int
    size: int
    blocks: tuple[int, ...]
    sums: tuple[int, ...] = ()

    @property
    def num_blocks(self) -> int:
        return len(self.blocks)


class TcpBlocks(msgspec.Struct, frozen=True, kw_only=True, tag="tcp_blocks"):
    """`num_blocks` that a worker sends to whoever connects and has the `key` of this `export`."""

    host: str
    port: int
    export: bytes
    key: bytes
    num_blocks: int

    def __repr__(self) -> str:  # a key is never logged
        return f"TcpBlocks({self.host}:{self.port}, {self.num_blocks} blocks)"


class NixlBlocks(msgspec.Struct, frozen=True, kw_only=True, tag="nixl_blocks"):
    """`blocks`, in order, of the pool of `pool_blocks` that the NIXL `agent` (its metadata) has
    registered at `address`. `sums`: a checksum of each chunk of them as it was exported.
    """

    agent: bytes
    address: int
    pool_blocks: int
    blocks: tuple[int, ...]
    sums: tuple[int, ...]

    @property
    def num_blocks(self) -> int:
        return len(self.blocks)


BlockLocation: TypeAlias = SharedBlocks | TcpBlocks | NixlBlocks


TransportName: TypeAlias = Literal["memory", "tcp", "nixl"]
MAX_COPIES = 3  # of a chunk that comes damaged


@dataclass(frozen=True, slots=True)
class Sharing:
    """How a pool is shared with other workers: through what, and for tcp on which host."""

    kind: TransportName = "memory"
    host: str = "127.0.0.1"


class Transport(Protocol):
    """One worker's end.

    `check` is called before each chunk is touched, without a checkpoint between: it raises
    StaleLease where a lease has gone, so that blocks of somebody else are never read or written.
    `num_damaged` chunks have come other than they were sent, and were asked for again.
    """

    num_damaged: int

    async def offer(self, blocks: Sequence[int], check: Callable[[], None]) -> BlockLocation:
        """Where another worker finds those blocks, for as long as `check` does not raise."""

    async def fetch(
        self, source: BlockLocation, blocks: Sequence[int], check: Callable[[], None]
    ) -> None:
        """Fill these blocks from where another worker has them, chunk by chunk.

        Raises StaleLease where the lease has ended; DamagedBlocks where a chunk came damaged
        `MAX_COPIES` times, or the worker cannot be reached, or falls silent. Every wait has a
        bound.
        """

    def drop_stale(self) -> None:
        """Let go of what belonged to workers, or leases, that are gone."""

    async def run(self) -> None:
        """Serve other workers until cancelled."""


def damaged(num_blocks: int) -> DamagedBlocks:
    return DamagedBlocks(f"{num_blocks} blocks came damaged {MAX_COPIES} times")


BlockPairs: TypeAlias = list[tuple[int, int]]  # (block of the sender, block of the receiver)


class Storage(Protocol):
    """The memory of one block pool. `num_damaged`: see Transport."""

    @property
    def num_damaged(self) -> int: ...

    async def receive(
        self, sender: "Storage", pairs: BlockPairs, check: Callable[[], None]
    ) -> None:
        """Copy blocks, chunk by chunk, a checkpoint after each.

        `check` is called before each chunk, without a checkpoint between it and the copy: it raises
        where either lease has gone, so that nothing is copied from or to blocks of somebody else.
        """

    # What follows is for a pool that other processes reach; see Transport.

    async def share(self, blocks: Sequence[int], check: Callable[[], None]) -> BlockLocation: ...

    async def fetch(
        self, source: BlockLocation, blocks: Sequence[int], check: Callable[[], None]
    ) -> None: ...

    def drop_stale(self) -> None: ...

    async def serve(self) -> None: ...
