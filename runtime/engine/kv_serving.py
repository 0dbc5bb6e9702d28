"""The worker's half of transfers: exports and imports KV blocks for engines of other processes."""

from collections.abc import Awaitable, Callable
from typing import Protocol, TypeAlias, runtime_checkable

import trio

from sagellm.runtime.comm.protocol import (
    Advanced,
    Done,
    Export,
    Exported,
    ExportPart,
    FromWorker,
    Hold,
    Import,
    Landing,
    Receive,
    ReceivePart,
    Release,
)
from sagellm.runtime.engine.remote_transfer import LEASE_S
from sagellm.runtime.kv.located import Located
from sagellm.runtime.kv.part import Part
from sagellm.runtime.kv.transfer import PoolSource
from sagellm.runtime.messages import LeaseRef
from sagellm.runtime.port import KVEngine

Action: TypeAlias = tuple[int, Callable[[], Awaitable[FromWorker]]]  # a call, what answers it


@runtime_checkable
class SharedKVEngine(KVEngine, Protocol):
    """An engine whose pool other processes reach: what a worker needs beside the port."""

    def export(self, lease: LeaseRef) -> PoolSource: ...

    async def export_part(self, lease: LeaseRef, part: Part) -> Located:
        """Where a part of a prompt is that is still being computed. Raises StaleLease."""

    async def receive(self, lease: LeaseRef, source: Located, num_landed: int = 0) -> None:
        """Fill a reserved lease from another process, after the blocks that have landed there.
        Raises StaleLease, DamagedBlocks.
        """

    async def receive_part(self, lease: LeaseRef, source: Located, part: Part) -> None:
        """Fill a part of it, while others are computed. Raises StaleLease, DamagedBlocks."""

    def tell_advances(self, tell: Callable[[LeaseRef, int], None]) -> None:
        """Call `tell` with the leases of prompts that are to be exported, and with how many of
        their blocks are computed, as that grows.
        """

    def forget_gone(self) -> None:
        """Let go of what belonged to other processes that are gone."""

    async def serve_blocks(self) -> None:
        """Let other processes fetch what is exported, until cancelled."""


class KVServer:
    """Does what is asked of one engine's pool. `say`: sends a message to the graph."""

    def __init__(self, engine: SharedKVEngine, say: Callable[[FromWorker], None]) -> None:
        self._engine = engine
        self._sources: dict[LeaseRef, PoolSource] = {}
        self._expiries_s: dict[LeaseRef, float] = {}
        self._exported, self._to_expire = trio.open_memory_channel[LeaseRef](float("inf"))
        engine.tell_advances(lambda lease, count: say(Advanced(lease=lease, num_blocks=count)))

    async def run(self) -> None:
        """Serve blocks, and end exports that nobody acknowledges, until cancelled."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._engine.serve_blocks)
            async for lease in self._to_expire:
                nursery.start_soon(self._expire, lease)

    def forget_gone(self) -> None:
        self._engine.forget_gone()

    def action(self, message: object) -> Action | None:
        """What answers a message, or None after one that needs no answer."""
        match message:
            case Export(call=call):
                return call, lambda: self._export(message)
            case ExportPart(call=call):
                return call, lambda: self._export_part(message)
            case Import(call=call):
                return call, lambda: self._import(message)
            case Receive(call=call):
                return call, lambda: self._receive(message)
            case ReceivePart(call=call):
                return call, lambda: self._receive_part(message)
            case Hold(lease=lease):
                if lease in self._expiries_s:
                    self._expiries_s[lease] = trio.current_time() + LEASE_S
            case Release(lease=lease):
                self._release(lease)
        return None

    async def _import(self, message: Import) -> Landing:
        target = await self._engine.import_(message.offer)
        return Landing(call=message.call, lease=target.lease)

    async def _export(self, message: Export) -> Exported:
        lease = message.lease
        source = self._engine.export(lease)
        self._sources[lease] = source
        self._expiries_s[lease] = trio.current_time() + LEASE_S
        self._exported.send_nowait(lease)
        return Exported(call=message.call, source=await source.share(message.num_landed))

    async def _export_part(self, message: ExportPart) -> Exported:
        source = await self._engine.export_part(message.lease, message.part)
        return Exported(call=message.call, source=source)

    async def _receive(self, message: Receive) -> Done:
        await self._engine.receive(message.lease, message.source, message.num_landed)
        return Done(call=message.call)

    async def _receive_part(self, message: ReceivePart) -> Done:
        await self._engine.receive_part(message.lease, message.source, message.part)
        return Done(call=message.call)

    def _release(self, lease: LeaseRef) -> None:
        source = self._sources.pop(lease, None)
        self._expiries_s.pop(lease, None)
        if source is not None:
            source.release()

    async def _expire(self, lease: LeaseRef) -> None:
        """Where nobody acknowledges it, nor says that the transfer goes on."""
        while self._expiries_s.get(lease, 0.0) > trio.current_time():  # noqa: ASYNC110
            await trio.sleep_until(self._expiries_s[lease])
        self._release(lease)
