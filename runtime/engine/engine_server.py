"""The worker's half of the engine port: serves one engine, of any kind, over a channel."""

from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Protocol, TypeAlias, runtime_checkable

import trio

from sagellm.runtime.comm.channel import Channel, ChannelClosed
from sagellm.runtime.comm.protocol import (
    BlocksReserved,
    CacheUpdate,
    Cancel,
    Done,
    Drop,
    Events,
    Export,
    ExportChunk,
    Exported,
    Grant,
    GrantCacheUpdate,
    Idle,
    Import,
    KVProgress,
    Ping,
    Pong,
    Ready,
    Receive,
    ReceiveChunk,
    Refused,
    Release,
    RenewLease,
    Stop,
    Submit,
    SyncCache,
    WorkerMessage,
)
from sagellm.runtime.engine.prefix_cache import open_cache_log
from sagellm.runtime.engine.worker_calls import LEASE_S
from sagellm.runtime.kv.cache_log import CacheLog
from sagellm.runtime.kv.transfer import PoolSource
from sagellm.runtime.kv.transport import BlockLocation, KVChunk
from sagellm.runtime.messages import LeaseRef
from sagellm.runtime.port import (
    CountingSteps,
    DamagedBlocks,
    Engine,
    EngineRefusal,
    KVEngine,
    Lost,
    StaleLease,
    moves_kv,
)
from sagellm.runtime.prefixes import ReportsCache

WINDOW = 4  # batches of events sent ahead of one reader; also reports of prefix blocks

# A call number, and a function that makes the answer.
Action: TypeAlias = tuple[int, Callable[[], Awaitable[WorkerMessage]]]


@runtime_checkable
class SharedKVEngine(KVEngine, Protocol):
    """An engine whose pool other processes reach: the methods that a worker needs in addition to
    the engine port.
    """

    def export(self, lease: LeaseRef) -> PoolSource: ...

    async def export_chunk(self, lease: LeaseRef, chunk: KVChunk) -> BlockLocation:
        """Offer a computed chunk of a prompt that is still being computed. Return the location of
        its blocks. Raises StaleLease.
        """

    async def receive(self, lease: LeaseRef, source: BlockLocation, num_received: int = 0) -> None:
        """Copy the blocks of another process into a reserved lease, except the first `num_received`
        blocks, which it has already. Raises StaleLease, DamagedBlocks.
        """

    async def receive_chunk(self, lease: LeaseRef, source: BlockLocation, chunk: KVChunk) -> None:
        """Copy a chunk of a prompt into a reserved lease, while later chunks are computed. Raises
        StaleLease, DamagedBlocks.
        """

    def report_kv_progress(self, report: Callable[[LeaseRef, int], None]) -> None:
        """Call `report` with the lease of a prompt that is to be exported, and with its number of
        computed blocks, whenever the number has grown.
        """

    def drop_stale(self) -> None:
        """Free resources of other processes that are gone."""

    async def serve_blocks(self) -> None:
        """Serve exported blocks to other processes, until cancelled."""


class KVServer:
    """Exports and imports KV blocks of one engine on messages of the graph. `say` sends a message
    to the graph.
    """

    def __init__(self, engine: SharedKVEngine, say: Callable[[WorkerMessage], None]) -> None:
        self._engine = engine
        self._sources: dict[LeaseRef, PoolSource] = {}
        self._expiries_s: dict[LeaseRef, float] = {}
        self._exported, self._to_expire = trio.open_memory_channel[LeaseRef](float("inf"))
        engine.report_kv_progress(
            lambda lease, count: say(KVProgress(lease=lease, num_blocks=count))
        )

    async def run(self) -> None:
        """Serve blocks, and end exports that no receiver acknowledges in time, until cancelled."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._engine.serve_blocks)
            async for lease in self._to_expire:
                nursery.start_soon(self._expire, lease)

    def drop_stale(self) -> None:
        self._engine.drop_stale()

    def action(self, message: object) -> Action | None:
        """The call number of a message, and the function that makes its answer. A message without
        an answer is handled at once, and None is returned.
        """
        match message:
            case Export(call=call):
                return call, lambda: self._export(message)
            case ExportChunk(call=call):
                return call, lambda: self._export_chunk(message)
            case Import(call=call):
                return call, lambda: self._import(message)
            case Receive(call=call):
                return call, lambda: self._receive(message)
            case ReceiveChunk(call=call):
                return call, lambda: self._receive_chunk(message)
            case RenewLease(lease=lease):
                if lease in self._expiries_s:
                    self._expiries_s[lease] = trio.current_time() + LEASE_S
            case Release(lease=lease):
                self._release(lease)
        return None

    async def _import(self, message: Import) -> BlocksReserved:
        target = await self._engine.import_(message.offer)
        return BlocksReserved(call=message.call, lease=target.lease)

    async def _export(self, message: Export) -> Exported:
        lease = message.lease
        source = self._engine.export(lease)
        self._sources[lease] = source
        self._expiries_s[lease] = trio.current_time() + LEASE_S
        self._exported.send_nowait(lease)
        return Exported(call=message.call, source=await source.share(message.num_received))

    async def _export_chunk(self, message: ExportChunk) -> Exported:
        source = await self._engine.export_chunk(message.lease, message.chunk)
        return Exported(call=message.call, source=source)

    async def _receive(self, message: Receive) -> Done:
        await self._engine.receive(message.lease, message.source, message.num_received)
        return Done(call=message.call)

    async def _receive_chunk(self, message: ReceiveChunk) -> Done:
        await self._engine.receive_chunk(message.lease, message.source, message.chunk)
        return Done(call=message.call)

    def _release(self, lease: LeaseRef) -> None:
        source = self._sources.pop(lease, None)
        self._expiries_s.pop(lease, None)
        if source is not None:
            source.release()

    async def _expire(self, lease: LeaseRef) -> None:
        """Release an exported lease, unless its receiver acknowledges it or renews it in time."""
        while self._expiries_s.get(lease, 0.0) > trio.current_time():  # noqa: ASYNC110
            await trio.sleep_until(self._expiries_s[lease])
        self._release(lease)


class EngineServer:
    """Runs `engine` until the graph sends `Stop`, or the channel ends."""

    def __init__(self, engine: Engine, channel: Channel) -> None:
        self._engine = engine
        self._channel = channel
        self._scopes: dict[int, trio.CancelScope] = {}  # of calls under way
        self._cache_log: CacheLog | None = None
        self._cache_window = WINDOW
        self._windows: dict[str, trio.Semaphore] = {}
        self._kv = _kv_server(engine, self._say)

    async def run(self) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._engine.run)
            if self._kv is not None:
                nursery.start_soon(self._kv.run)
            self._channel.put(Ready(facts=self._engine.facts))
            with suppress(ChannelClosed):  # the graph is gone
                while not isinstance(message := await self._channel.receive(), Stop):
                    await self._obey(message, nursery)
            nursery.cancel_scope.cancel()

    async def _obey(self, message: object, nursery: trio.Nursery) -> None:
        match message:
            case Submit(call=call, state=state):
                if state.owner not in self._windows:
                    self._windows[state.owner] = trio.Semaphore(WINDOW)
                    nursery.start_soon(self._forward, state.owner)
                # Awaited here: a later `Cancel` must not overtake the sequence that it cancels.
                await self._answer(call, lambda: self._submit(call, message))
            case Cancel(request_id=request_id, choice=choice, epoch=epoch):
                self._engine.cancel(request_id, choice, epoch)
            case Grant(owner=owner) if owner in self._windows:
                self._windows[owner].release()
            case SyncCache() if isinstance(self._engine, ReportsCache):
                self._cache_log = open_cache_log(self._engine, self._say_cache)
                self._say_cache()
            case GrantCacheUpdate():
                self._cache_window += 1
                self._say_cache()
            case Idle(call=call):
                nursery.start_soon(self._answer, call, lambda: self._idle(call))
            case Drop(call=call):
                if call in self._scopes:
                    self._scopes[call].cancel()
            case Ping():
                if self._kv is not None:
                    self._kv.drop_stale()
                self._say(self._pong())
            case _ if self._kv is not None:
                self._obey_kv(self._kv, message, nursery)

    def _obey_kv(self, server: KVServer, message: object, nursery: trio.Nursery) -> None:
        action = server.action(message)
        if action is not None:
            nursery.start_soon(self._answer, *action)

    async def _answer(self, call: int, action: Callable[[], Awaitable[WorkerMessage]]) -> None:
        """Answer a call with its outcome. Every call is answered once, even a dropped call: the
        graph waits for the answer before it frees blocks.
        """
        answer: WorkerMessage = Refused(call=call, kind="refusal", error="the call was dropped")
        with trio.CancelScope() as scope:
            self._scopes[call] = scope
            try:
                answer = await action()
            except EngineRefusal as error:
                answer = Refused(call=call, kind="refusal", error=str(error), code=error.code)
            except StaleLease as error:
                answer = Refused(call=call, kind="stale", error=str(error))
            except DamagedBlocks as error:
                answer = Refused(call=call, kind="damaged", error=str(error))
            finally:
                del self._scopes[call]
        self._say(answer)

    async def _submit(self, call: int, message: Submit) -> Done:
        await self._engine.submit(message.state)
        return Done(call=call)

    def _pong(self) -> Pong:
        engine = self._engine
        steps = engine.step_tokens if isinstance(engine, CountingSteps) else None
        return Pong(
            load=engine.load,
            health=engine.health,
            step_tokens=tuple(steps.counts) if steps is not None else (),
            num_step_tokens=steps.total if steps is not None else 0.0,
        )

    async def _idle(self, call: int) -> Done:
        await self._engine.idle()
        self._say(self._pong())
        return Done(call=call)

    async def _forward(self, owner: str) -> None:
        """Send the events of one owner, at most `WINDOW` batches ahead of its reader."""
        async for events in self._engine.events(owner):
            await self._windows[owner].acquire()
            sent = tuple(event for event in events if not isinstance(event, Lost))
            self._say(Events(owner=owner, events=sent, load=self._engine.load))

    def _say_cache(self) -> None:
        """Send reports of changed prefix blocks, at most `WINDOW` reports ahead of the graph."""
        assert self._cache_log is not None
        while self._cache_window and (report := self._cache_log.take()) is not None:
            self._cache_window -= 1
            self._say(CacheUpdate(**report._asdict()))

    def _say(self, message: WorkerMessage) -> None:
        with suppress(ChannelClosed):  # `run` ends when it receives from the channel
            self._channel.put(message)


def _kv_server(engine: Engine, say: Callable[[WorkerMessage], None]) -> KVServer | None:
    """The server of an engine's KV blocks; None for an engine that cannot move blocks. Raises
    TypeError for an engine that declares `kv_transfer` without the methods that a worker needs.
    """
    if not moves_kv(engine):
        return None
    if not isinstance(engine, SharedKVEngine):
        raise TypeError(f"{type(engine).__name__} cannot move KV blocks between processes")
    return KVServer(engine, say)
