"""Where the blocks of an exported lease are, as one worker tells another through the graph."""

from typing import TypeAlias

import msgspec


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


Located: TypeAlias = SharedBlocks | TcpBlocks | NixlBlocks
