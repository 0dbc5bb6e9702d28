"""Blocks through memory that processes of one host share: one copy, and no message.

The memory is a file without a name: it is reached through the process that made it, by whoever may
look into that process, and is gone with the last process that has it open. So none is ever left
behind, and nobody guesses a name.
"""

import errno
import mmap
import os
from collections.abc import Callable, Sequence

import trio

from sagellm.graphs.log import get_logger
from sagellm.runtime.kv.located import Located, SharedBlocks
from sagellm.runtime.kv.pool_bytes import PoolBytes, runs_of
from sagellm.runtime.kv.transport import MOST_COPIES, damaged
from sagellm.runtime.port import DamagedBlocks, StaleLease

log = get_logger("sagellm.kv")

_FULL = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)


class SharedMemory:
    """Memory that this process shares; `view` is all of it."""

    def __init__(self, size: int) -> None:
        self.descriptor = os.memfd_create("sagellm-kv", os.MFD_CLOEXEC)
        os.ftruncate(self.descriptor, size)
        self.size = size
        self.view = memoryview(mmap.mmap(self.descriptor, size))


class SharedTransport:
    """Implements Transport for a pool that lies in shared memory."""

    def __init__(self, pool: PoolBytes, memory: SharedMemory) -> None:
        self.num_damaged = 0
        self._pool = pool
        self._memory = memory
        self._mapped: dict[tuple[int, int, int], memoryview] = {}

    async def offer(self, blocks: Sequence[int], check: Callable[[], None]) -> SharedBlocks:
        sums = await self._pool.sums(blocks, check)
        return SharedBlocks(
            pid=os.getpid(),
            descriptor=self._memory.descriptor,
            size=self._memory.size,
            blocks=tuple(blocks),
            sums=sums,
        )

    async def fetch(
        self, source: Located, blocks: Sequence[int], check: Callable[[], None]
    ) -> None:
        if not isinstance(source, SharedBlocks):
            raise TypeError(f"memory fetches from memory, not from {type(source).__name__}")
        sender = self._map(source)
        num_blocks = source.size // self._pool.storage.layout.block_bytes
        if not all(0 <= block < num_blocks for block in source.blocks):
            raise StaleLease(f"process {source.pid} has no such blocks as it said")
        runs = runs_of(list(zip(source.blocks, blocks, strict=True)))
        chunks = self._pool.chunks(len(blocks))
        for chunk, wanted in zip(chunks, source.sums, strict=True):
            for _ in range(MOST_COPIES):
                check()
                found = self._pool.storage.receive(sender, runs, chunk)
                await trio.lowlevel.checkpoint()
                if found == wanted:
                    break
                self.num_damaged += 1
            else:
                raise damaged(len(blocks))

    def forget_gone(self) -> None:
        for where in tuple(self._mapped):
            if not is_there(*where):
                del self._mapped[where]

    async def run(self) -> None:
        """Others read without being served."""
        await trio.sleep_forever()

    def _map(self, source: SharedBlocks) -> memoryview:
        where = source.pid, source.descriptor, source.size
        if where not in self._mapped:
            self._mapped[where] = map_shared(*where)
        return self._mapped[where]


def is_there(pid: int, descriptor: int, size: int) -> bool:
    """Whether a process still has that memory open."""
    try:
        return os.stat(f"/proc/{pid}/fd/{descriptor}").st_size == size
    except OSError:
        return False


def map_shared(pid: int, descriptor: int, size: int) -> memoryview:
    """Another process's memory, to read. Raises StaleLease where the process is gone, or what it
    has open there is not that; DamagedBlocks where this process can map no more.
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
    except OSError as error:  # to map it takes another descriptor
        raise _unmapped(error) from None
    finally:
        os.close(opened)


def _unmapped(error: OSError) -> DamagedBlocks:
    log.warning("kv_not_mapped", error=error.strerror)
    return DamagedBlocks(f"the blocks cannot be mapped: {error.strerror}")
