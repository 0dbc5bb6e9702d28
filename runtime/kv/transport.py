"""Contracts of KV transfers: locations of offered blocks, transports, storages, and the circuit
breakers of links that fail.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeAlias

import msgspec

from sagellm.graphs.log import get_logger
from sagellm.runtime.port import DamagedBlocks

log = get_logger("sagellm.kv")


class KVChunk(msgspec.Struct, frozen=True, kw_only=True):
    """Blocks `first` to `end`, exclusive, of a prompt, in the tables of full attention.

    Windows and recurrent states are not in chunks: they change while the prompt is computed, and
    are copied at its end.
    """

    first: int
    end: int

    @property
    def num_blocks(self) -> int:
        return self.end - self.first


class SharedBlocks(msgspec.Struct, frozen=True, kw_only=True, tag="shared_blocks"):
    """Blocks in shared memory. `blocks`: their numbers, in order, in a pool of `size` bytes, which
    process `pid` of this host has open as `descriptor`. `sums`: the checksum of each chunk at the
    time of the offer.
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
    """`num_blocks` blocks that a worker, at `host` and TCP port `port`, sends to a receiver that
    has the `key` of this `export`.
    """

    host: str
    port: int
    export: bytes
    key: bytes
    num_blocks: int

    def __repr__(self) -> str:  # a key is never logged
        return f"TcpBlocks({self.host}:{self.port}, {self.num_blocks} blocks)"


class NixlBlocks(msgspec.Struct, frozen=True, kw_only=True, tag="nixl_blocks"):
    """Blocks that NIXL reads. `blocks`: their numbers, in order, in a pool of `pool_blocks` blocks.
    `agent`: the metadata of the NIXL agent that has registered the pool at `address`. `sums`: the
    checksum of each chunk at the time of the offer.
    """

    agent: bytes
    address: int
    pool_blocks: int
    blocks: tuple[int, ...]
    sums: tuple[int, ...]

    @property
    def num_blocks(self) -> int:
        return len(self.blocks)


class CustomBlocks(msgspec.Struct, frozen=True, kw_only=True, tag="custom_blocks"):
    """`num_blocks` blocks of a user's transport. Only that transport encodes and decodes
    `address`.
    """

    transport: str
    num_blocks: int
    address: bytes

    def __repr__(self) -> str:  # an address may hold a key, which is never logged
        return f"CustomBlocks({self.transport}, {self.num_blocks} blocks)"


BlockLocation: TypeAlias = SharedBlocks | TcpBlocks | NixlBlocks | CustomBlocks

MAX_COPIES = 3  # of a chunk that arrives damaged each time


@dataclass(frozen=True, slots=True)
class Sharing:
    """The way to share a pool with other workers: a transport's name, and a host to listen on."""

    kind: str = "memory"
    host: str = "127.0.0.1"


class HostMemory(Protocol):
    """Memory of the host that a pool is placed in."""

    @property
    def view(self) -> memoryview:
        """All of the memory, writable."""
        ...


LeaseCheck: TypeAlias = Callable[[], None]  # raises StaleLease if the blocks may have a new owner


class Transport(Protocol):
    """One worker's end of a transport. A transport whose receivers need no server can inherit
    `drop_stale` and `run`.

    A transport calls `check` before it reads or writes each chunk, without a checkpoint in between.
    `check` raises StaleLease after the lease has ended, so blocks of another owner are never
    touched. `num_damaged` counts the chunks that arrived damaged and were requested again.
    """

    num_damaged: int = 0

    async def offer(self, blocks: Sequence[int], check: LeaseCheck) -> BlockLocation:
        """Offer `blocks` until `check` raises. Return their location for a receiver.

        The blocks do not change meanwhile: `check` raises before they are written again.
        """

    async def fetch(self, source: BlockLocation, blocks: Sequence[int], check: LeaseCheck) -> None:
        """Copy offered blocks into `blocks` of this pool, chunk by chunk. Every wait has a time
        limit.

        Raises StaleLease if the lease has ended; DamagedBlocks if a chunk arrived damaged
        `MAX_COPIES` times, or the sender cannot be reached, or stops sending. After an error or a
        cancellation the content of `blocks` is undefined.
        """

    def drop_stale(self) -> None:
        """Release resources of workers and leases that have ended. Called from time to time."""

    async def run(self) -> None:
        """Serve other workers until cancelled."""


def damaged(num_blocks: int) -> DamagedBlocks:
    """The error of a chunk that arrived damaged `MAX_COPIES` times."""
    return DamagedBlocks(f"{num_blocks} blocks came damaged {MAX_COPIES} times")


BlockPairs: TypeAlias = list[tuple[int, int]]  # (block of the sender, block of the receiver)


class Storage(Protocol):
    """The memory of one block pool, as transfers see it. `num_damaged`: see Transport."""

    @property
    def num_damaged(self) -> int: ...

    async def receive(self, sender: "Storage", pairs: BlockPairs, check: LeaseCheck) -> None:
        """Copy blocks inside this process, chunk by chunk, with a checkpoint after each chunk.

        `check` is called before each chunk, without a checkpoint before the copy. It raises
        StaleLease after either lease has ended, so that blocks of another owner are never touched.
        """

    # The rest is for a pool that other processes reach; see Transport.

    async def share(self, blocks: Sequence[int], check: LeaseCheck) -> BlockLocation: ...

    async def fetch(
        self, source: BlockLocation, blocks: Sequence[int], check: LeaseCheck
    ) -> None: ...

    def drop_stale(self) -> None: ...

    async def serve(self) -> None: ...


_End: TypeAlias = tuple[str, int]  # an engine's name and a replica
TransferLink: TypeAlias = tuple[_End, _End]  # from sender to receiver

MAX_FAILURES = 5  # in a row; then the breaker opens
_SLOW_S = 1.0  # a failure that takes this long counts as `MAX_FAILURES` failures
# An open breaker lets no transfer through for this multiple of the time that the last transfer took
# to fail, within bounds.
_SHARE = 4.0
_LEAST_S, _LONGEST_S = 0.25, 30.0


@dataclass(slots=True)
class _Record:
    """The state of one breaker. `num_failed`: failures in a row. `rests_until_s`: the time until
    which an open breaker lets no transfer through. `is_tried`: whether the one transfer that tests
    an open breaker is in progress.
    """

    num_failed: int = 0
    rests_until_s: float = 0.0
    is_tried: bool = False


class CircuitBreaker:
    """Decides for each link whether a transfer is tried. All times are of one clock.

    After `MAX_FAILURES` failures in a row, the breaker of a link opens: it lets one transfer
    through after each pause, until a transfer passes. So requests that wait for a transfer slot do
    not wait for one failure after the other.
    """

    def __init__(self) -> None:
        self._records: dict[TransferLink, _Record] = {}

    def begin(self, link: TransferLink, now: float) -> bool:
        """Whether to try a transfer. If so, the caller must report its end by `passed`, `failed` or
        `left`.
        """
        record = self._records.setdefault(link, _Record())
        if record.num_failed < MAX_FAILURES:
            return True
        if record.is_tried or now < record.rests_until_s:
            return False
        record.is_tried = True
        return True

    def passed(self, link: TransferLink) -> None:
        record = self._records[link]
        if record.num_failed >= MAX_FAILURES:
            log.info("kv_link_back", **_named(link))
        self._records[link] = _Record()

    def failed(self, link: TransferLink, now: float, *, took_s: float) -> None:
        record = self._records[link]
        record.is_tried = False
        was_resting = record.num_failed >= MAX_FAILURES
        record.num_failed += MAX_FAILURES if took_s >= _SLOW_S else 1
        record.rests_until_s = now + min(max(_SHARE * took_s, _LEAST_S), _LONGEST_S)
        if record.num_failed >= MAX_FAILURES and not was_resting:
            log.warning("kv_link_rests", **_named(link), took_s=round(took_s, 3))

    def left(self, link: TransferLink) -> None:
        """Report a transfer that ended for a reason of its request, such as a cancel."""
        self._records[link].is_tried = False


def _named(link: TransferLink) -> dict[str, str]:
    (sender, from_number), (receiver, to_number) = link
    return {"sender": f"{sender}[{from_number}]", "receiver": f"{receiver}[{to_number}]"}
