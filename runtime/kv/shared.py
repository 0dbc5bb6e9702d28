"""A block pool's memory that other processes of this host can read, and how they find it.

The memory is a file without a name: it is reached through the process that made it, by whoever may
look into that process, and is gone with the last process that has it open. So none is ever left
behind, and nobody guesses a name.
"""

import mmap
import os
from collections.abc import Sequence

import msgspec

from sagellm.runtime.engine.port import StaleLease


class SharedBlocks(msgspec.Struct, frozen=True, kw_only=True, tag="shared_blocks"):
    """The blocks of an exported lease: `blocks`, in order, of the pool of `size` bytes that process
    `pid` has open as `descriptor`. `sums`: a checksum of each chunk of them as it was exported.
    """

    pid: int
    descriptor: int
    size: int
    blocks: tuple[int, ...]
    sums: tuple[int, ...] = ()


class SharedMemory:
    """Memory that this process shares; `view` is all of it."""

    def __init__(self, size: int) -> None:
        self.descriptor = os.memfd_create("sagellm-kv", os.MFD_CLOEXEC)
        os.ftruncate(self.descriptor, size)
        self.size = size
        self.view = memoryview(mmap.mmap(self.descriptor, size))

    def tell(self, blocks: Sequence[int], sums: Sequence[int]) -> SharedBlocks:
        return SharedBlocks(
            pid=os.getpid(),
            descriptor=self.descriptor,
            size=self.size,
            blocks=tuple(blocks),
            sums=tuple(sums),
        )


def is_there(pid: int, descriptor: int, size: int) -> bool:
    """Whether a process still has that memory open."""
    try:
        return os.stat(f"/proc/{pid}/fd/{descriptor}").st_size == size
    except OSError:
        return False


def map_shared(pid: int, descriptor: int, size: int) -> memoryview:
    """Another process's memory, to read. Raises StaleLease where the process is gone, or what it
    has open there is not that.
    """
    try:
        opened = os.open(f"/proc/{pid}/fd/{descriptor}", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        raise StaleLease(f"process {pid} that holds the blocks is gone") from None
    try:
        if os.fstat(opened).st_size != size:
            raise StaleLease(f"process {pid} shares other memory than it said")
        return memoryview(mmap.mmap(opened, size, prot=mmap.PROT_READ))
    finally:
        os.close(opened)
