"""A pool's memory in chunks, and copies inside one host: in one process, or by shared memory.

Shared memory is a file without a name. Another process opens the memory through the process that
made it, if it may inspect that process. The memory is freed when the last process has closed it: no
file is left over, and no name can be guessed.
"""

import errno
import mmap
import os
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TypeAlias

import numpy as np
import trio

from sagellm.backends import KVStorage
from sagellm.graphs.log import get_logger
from sagellm.runtime.kv.transport import (
    MAX_COPIES,
    BlockLocation,
    BlockPairs,
    HostMemory,
    LeaseCheck,
    SharedBlocks,
    Storage,
    Transport,
    damaged,
)
from sagellm.runtime.port import DamagedBlocks, StaleLease

log = get_logger("sagellm.kv")

# Bytes that are moved between two checkpoints: about a millisecond of memory traffic, for which
# other tasks of the thread wait.
_CHUNK_BYTES = 4 * 2**20

RunPair: TypeAlias = tuple[slice, slice]  # blocks of the sender, and of the receiver


@dataclass(frozen=True, slots=True)
class PoolBytes:
    """The memory of a pool, as transports see it. `memory`: the host memory that a transport has
    allocated for the pool, if any. Copies run in chunks, so that other tasks can run between them.
    """

    storage: KVStorage
    memory: HostMemory | None = None

    def chunks(self, num_blocks: int) -> list[range]:
        """The chunks of a copy of `num_blocks` blocks: ranges of layers, each of about
        `_CHUNK_BYTES`.
        """
        layout = self.storage.layout
        layer_bytes = layout.block_bytes // layout.num_layers
        layers = range(layout.num_layers)
        step = max(1, _CHUNK_BYTES // (num_blocks * layer_bytes))
        return [layers[start : start + step] for start in range(0, len(layers), step)]

    async def sums(self, blocks: Sequence[int], check: LeaseCheck) -> tuple[int, ...]:
        """The checksum of each chunk of `blocks`. Calls `check` before each chunk, and has a
        checkpoint after it.
        """
        sums, runs = [], slices_of(blocks)
        for chunk in self.chunks(len(blocks)):
            check()
            sums.append(self.storage.checksum(runs, chunk))
            await trio.lowlevel.checkpoint()
        return tuple(sums)


def slices_of(blocks: Sequence[int]) -> list[slice]:
    """Blocks as slices: each run of consecutive blocks is one slice."""
    return [run for run, _ in runs_of([(block, block) for block in blocks])]


def runs_of(pairs: BlockPairs) -> list[RunPair]:
    """Pairs as slices: each run in which both blocks rise by one is one pair of slices."""
    if not pairs:
        return []
    blocks = np.array(pairs)
    breaks = np.flatnonzero((np.diff(blocks, axis=0) != 1).any(axis=1)) + 1
    bounds = [0, *map(int, breaks), len(pairs)]
    return [
        (_rising(pairs[start][0], end - start), _rising(pairs[start][1], end - start))
        for start, end in pairwise(bounds)
    ]


def _rising(first: int, count: int) -> slice:
    return slice(first, first + count)


@dataclass(slots=True)
class DeviceStorage:
    """Implements Storage for a pool on a device. `transport`: how other processes reach the pool;
    None if no other process does.
    """

    pool: PoolBytes
    transport: Transport | None = None

    @property
    def num_damaged(self) -> int:
        return self.transport.num_damaged if self.transport is not None else 0

    async def receive(self, sender: Storage, pairs: BlockPairs, check: LeaseCheck) -> None:
        if not isinstance(sender, DeviceStorage):
            raise TypeError(f"devices receive from devices, not from {type(sender).__name__}")
        runs = runs_of(pairs)
        for layers in self.pool.chunks(len(pairs)):
            check()
            self.pool.storage.copy(sender.pool.storage, runs, layers)
            await trio.lowlevel.checkpoint()

    async def share(self, blocks: Sequence[int], check: LeaseCheck) -> BlockLocation:
        return await self._required.offer(blocks, check)

    async def fetch(self, source: BlockLocation, blocks: Sequence[int], check: LeaseCheck) -> None:
        await self._required.fetch(source, blocks, check)

    def drop_stale(self) -> None:
        self._required.drop_stale()

    async def serve(self) -> None:
        await self._required.run()

    @property
    def _required(self) -> Transport:
        assert self.transport is not None, "this pool is of one process alone"
        return self.transport


_FULL = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)


class SharedMemory:
    """Memory of this process that other processes can map. Implements HostMemory."""

    def __init__(self, size: int) -> None:
        self.descriptor = os.memfd_create("sagellm-kv", os.MFD_CLOEXEC)
        os.ftruncate(self.descriptor, size)
        self.size = size
        self.view = memoryview(mmap.mmap(self.descriptor, size))


class SharedTransport:
    """Implements Transport for a pool in shared memory. A receiver copies straight out of the
    sender's memory, without a message.
    """

    def __init__(self, pool: PoolBytes, memory: SharedMemory) -> None:
        self.num_damaged = 0
        self._pool = pool
        self._memory = memory
        self._mapped: dict[tuple[int, int, int], memoryview] = {}

    async def offer(self, blocks: Sequence[int], check: LeaseCheck) -> SharedBlocks:
        sums = await self._pool.sums(blocks, check)
        return SharedBlocks(
            pid=os.getpid(),
            descriptor=self._memory.descriptor,
            size=self._memory.size,
            blocks=tuple(blocks),
            sums=sums,
        )

    async def fetch(self, source: BlockLocation, blocks: Sequence[int], check: LeaseCheck) -> None:
        if not isinstance(source, SharedBlocks):
            raise TypeError(f"memory fetches from memory, not from {type(source).__name__}")
        sender = self._map(source)
        num_blocks = source.size // self._pool.storage.layout.block_bytes
        if not all(0 <= block < num_blocks for block in source.blocks):
            raise StaleLease(f"process {source.pid} has no such blocks as it said")
        runs = runs_of(list(zip(source.blocks, blocks, strict=True)))
        chunks = self._pool.chunks(len(blocks))
        for chunk, wanted in zip(chunks, source.sums, strict=True):
            for _ in range(MAX_COPIES):
                check()
                found = self._pool.storage.receive(sender, runs, chunk)
                await trio.lowlevel.checkpoint()
                if found == wanted:
                    break
                self.num_damaged += 1
            else:
                raise damaged(len(blocks))

    def drop_stale(self) -> None:
        for where in tuple(self._mapped):
            if not is_there(*where):
                del self._mapped[where]

    async def run(self) -> None:
        """Sleep until cancelled: receivers read the memory themselves."""
        await trio.sleep_forever()

    def _map(self, source: SharedBlocks) -> memoryview:
        where = source.pid, source.descriptor, source.size
        if where not in self._mapped:
            self._mapped[where] = map_shared(*where)
        return self._mapped[where]


def is_there(pid: int, descriptor: int, size: int) -> bool:
    """Whether process `pid` still has memory of `size` bytes open as `descriptor`."""
    try:
        return os.stat(f"/proc/{pid}/fd/{descriptor}").st_size == size
    except OSError:
        return False


def map_shared(pid: int, descriptor: int, size: int) -> memoryview:
    """Map the memory of process `pid` for reading. Raises StaleLease if the process is gone, or has
    another file open as `descriptor`; DamagedBlocks if this process can map no more memory.
    """
    try:
        opened = os.open(f"/proc/{pid}/fd/{descriptor}", os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        if error.errno in _FULL:
            raise _unmapped(error) from None
        raise StaleLease(f"process {pid} that holds the blocks is gone") from None
    try:
        if os.fstat(opened).st_size != size:
            raise StaleLease(f"process {pid} shares other memory than it said")
        return memoryview(mmap.mmap(opened, size, prot=mmap.PROT_READ))
    except OSError as error:  # mmap duplicates the descriptor, and there may be none left
        raise _unmapped(error) from None
    finally:
        os.close(opened)


def _unmapped(error: OSError) -> DamagedBlocks:
    log.warning("kv_not_mapped", error=error.strerror)
    return DamagedBlocks(f"the blocks cannot be mapped: {error.strerror}")
