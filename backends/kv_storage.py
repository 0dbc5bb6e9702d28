"""The memory of one KV block pool, which a backend owns, and how bytes get in and out of it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, TypeAlias

from sagellm.backends.step import KVLayout

Runs: TypeAlias = Sequence[slice]  # of blocks of a pool that follow each other
RunPairs: TypeAlias = Sequence[tuple[slice, slice]]  # runs of the sender and of the receiver


@dataclass(frozen=True, slots=True)
class Region:
    """Memory that may be registered for remote reads. `kind`: as NIXL names it."""

    address: int
    num_bytes: int
    kind: str = "DRAM"
    device_index: int = 0


class Staged(Protocol):
    """Buffers of the host for blocks that arrive. `views`, in the order of `KVStorage.read`."""

    @property
    def views(self) -> list[memoryview]: ...

    def commit(self) -> None:
        """What is in the views is in the pool afterwards; on a CPU it is there already."""
        ...


class KVStorage(Protocol):
    """The keys and values of one block pool. Nothing above a backend touches their bytes but here.

    All calls come from one thread and return when they are done. The caller sees to it that no
    launch under way writes blocks that are read, or reads blocks that are written. Bytes of the
    host are in one order: layer after layer, in a layer keys then values, of these run after run.
    """

    @property
    def layout(self) -> KVLayout: ...

    @property
    def num_blocks(self) -> int: ...

    def copy(self, source: "KVStorage", pairs: RunPairs, layers: range) -> None:
        """From a pool of the same backend and layout, perhaps of another device. Raises TypeError
        for a pool of another backend.
        """
        ...

    def receive(self, memory: memoryview, pairs: RunPairs, layers: range) -> int:
        """From a pool of the same layout that lies in `memory` of the host; the checksum (XXH3, 64
        bits) of what has arrived.
        """
        ...

    def read(self, runs: Runs, layers: range) -> list[memoryview]:
        """The bytes of blocks: the pool's own memory, or a copy, which the views keep alive."""
        ...

    def stage(self, runs: Runs, layers: range) -> Staged:
        """Buffers to fill with the bytes of blocks."""
        ...

    def checksum(self, runs: Runs, layers: range) -> int:
        """XXH3, 64 bits, of what `read` gives."""
        ...

    def register(self) -> Region:
        """All of the pool: its address stays the same as long as the storage lives."""
        ...


def places_of(
    address: int, layout: KVLayout, num_blocks: int, runs: Runs, layers: range
) -> list[tuple[int, int]]:
    """Address and size of what `KVStorage.read` gives, in a pool that begins at `address`."""
    block_bytes = layout.block_bytes // (2 * layout.num_layers)
    return [
        (
            address + ((layer * 2 + kind) * num_blocks + run.start) * block_bytes,
            (run.stop - run.start) * block_bytes,
        )
        for layer in layers
        for kind in range(2)
        for run in runs
    ]
