"""The transport `nixl` (`sagellm[nixl]`): RDMA if the hosts have it, else the best way that UCX
finds.

The receiver reads into a bounce buffer first: a NIXL transfer cannot be cancelled, and must not
write blocks that have got a new owner.
"""

import hashlib
import logging
import secrets
from collections.abc import Sequence
from typing import Any

import nixl_cu12._bindings as _bindings
import numpy as np
import trio
import xxhash
from nixl_cu12 import nixl_agent, nixl_agent_config

from sagellm.backends.interface import block_addresses
from sagellm.graphs.log import get_logger
from sagellm.runtime.kv.memory import PoolBytes, RunPair, runs_of, slices_of
from sagellm.runtime.kv.transport import MAX_COPIES, BlockLocation, LeaseCheck, NixlBlocks, damaged
from sagellm.runtime.port import DamagedBlocks

log = get_logger("sagellm.kv")

logging.getLogger("nixl").setLevel(logging.WARNING)  # lower levels go to standard output
_LOOK_S = 50e-6  # between two polls of a transfer
_STALL_S = 5.0  # for one chunk, after which the sender counts as gone
_DRAM = "DRAM"


_UNREACHABLE = (
    _bindings.nixlBackendError,
    _bindings.nixlRemoteDisconnectError,
    _bindings.nixlNotFoundError,
    _bindings.nixlCancelledError,
    _bindings.nixlInvalidParamError,
    _bindings.nixlMismatchError,
)


def _gone(why: object) -> DamagedBlocks:
    log.warning("kv_peer_gone", why=str(why))
    return DamagedBlocks("the worker that holds the blocks cannot be reached")


class NixlTransport:
    """Implements Transport by NIXL."""

    def __init__(self, pool: PoolBytes) -> None:
        self.num_damaged = 0
        self._pool = pool
        self._agent = nixl_agent(secrets.token_hex(16), nixl_agent_config(backends=["UCX"]))
        region = self._region = pool.storage.register()
        where = region.address, region.num_bytes, region.device_index, ""
        self._agent.register_memory([where], region.kind)
        self._metadata: bytes = self._agent.get_agent_metadata()
        self._peers: dict[bytes, str] = {}
        self._bounce = np.empty(0, dtype=np.uint8)
        self._bounce_registered: Any = None
        self._abandoned: list[Any] = []
        self._lock = trio.Lock()  # guards the bounce buffer

    async def offer(self, blocks: Sequence[int], check: LeaseCheck) -> NixlBlocks:
        sums = await self._pool.sums(blocks, check)
        return NixlBlocks(
            agent=self._metadata,
            address=self._region.address,
            pool_blocks=self._pool.storage.num_blocks,
            blocks=tuple(blocks),
            sums=sums,
        )

    async def fetch(self, source: BlockLocation, blocks: Sequence[int], check: LeaseCheck) -> None:
        if not isinstance(source, NixlBlocks):
            raise TypeError(f"NIXL fetches from NIXL, not from {type(source).__name__}")
        peer = self._peer(source.agent)
        runs = runs_of(list(zip(source.blocks, blocks, strict=True)))
        targets = slices_of(blocks)
        chunks = self._pool.chunks(len(blocks))
        async with self._lock:
            for chunk, wanted in zip(chunks, source.sums, strict=True):
                for _ in range(MAX_COPIES):
                    await self._read(peer, source, chunk, runs)
                    if self._copy_out(chunk, targets, wanted, check):
                        break
                    self.num_damaged += 1
                else:
                    raise damaged(len(blocks))

    def drop_stale(self) -> None:
        """Do nothing: the names of dead agents are small, and are never used again."""

    async def run(self) -> None:
        """Sleep until cancelled: the NIXL agent serves from its own thread."""
        await trio.sleep_forever()

    def _peer(self, metadata: bytes) -> str:
        key = hashlib.blake2b(metadata).digest()
        if key not in self._peers:
            try:
                name = self._agent.add_remote_agent(metadata)
            except _UNREACHABLE as error:
                raise _gone(error) from None
            self._peers[key] = name.decode() if isinstance(name, bytes) else name
        return self._peers[key]

    async def _read(
        self, peer: str, source: NixlBlocks, layers: range, runs: Sequence[RunPair]
    ) -> None:
        """Fill the bounce buffer with a chunk, in the order of `KVStorage.read`."""
        layout, sent = self._pool.storage.layout, [sent for sent, _ in runs]
        theirs = block_addresses(source.address, layout, source.pool_blocks, sent, layers)
        self._make_room(sum(size for _, size in theirs))
        ours, at = [], self._bounce.ctypes.data
        for _, size in theirs:
            ours.append((at, size, 0))
            at += size
        # Shielded: NIXL may write the buffer until the transfer has ended.
        with trio.CancelScope(shield=True):
            try:
                handle = self._agent.initialize_xfer(
                    "READ",
                    self._agent.get_xfer_descs(ours, _DRAM),
                    self._agent.get_xfer_descs([(*place, 0) for place in theirs], _DRAM),
                    peer,
                )
                state = self._agent.transfer(handle)
                with trio.move_on_after(_STALL_S):
                    while state == "PROC":
                        await trio.sleep(_LOOK_S)
                        state = self._agent.check_xfer_state(handle)
                self._agent.release_xfer_handle(handle)
            except _UNREACHABLE as error:
                self._abandon_bounce()
                raise _gone(error) from None
        await trio.lowlevel.checkpoint()
        if state != "DONE":
            self._abandon_bounce()
            raise _gone(state)

    def _abandon_bounce(self) -> None:
        """Never use this bounce buffer again: late bytes must not reach the next chunk."""
        self._abandoned.append(self._bounce)
        self._bounce, self._bounce_registered = np.empty(0, dtype=np.uint8), None

    def _make_room(self, size: int) -> None:
        if len(self._bounce) < size:
            if self._bounce_registered is not None:
                self._agent.deregister_memory(self._bounce_registered)
            self._bounce = np.empty(size, dtype=np.uint8)
            self._bounce_registered = self._agent.register_memory(
                [(self._bounce.ctypes.data, size, 0, "")], _DRAM
            )

    def _copy_out(
        self, layers: range, targets: Sequence[slice], wanted: int, check: LeaseCheck
    ) -> bool:
        """Copy the bounce buffer into the blocks, if it has the checksum `wanted`. Return whether
        it has.
        """
        staged, at = self._pool.storage.stage(targets, layers), 0
        size = sum(map(len, staged.views))
        check()
        if xxhash.xxh3_64_intdigest(self._bounce[:size].data) != wanted:
            return False
        for view in staged.views:
            view[:] = self._bounce[at : at + len(view)].data
            at += len(view)
        staged.commit()
        return True
