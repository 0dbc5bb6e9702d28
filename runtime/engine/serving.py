"""The worker's half of the engine port: does what a channel asks of one local engine."""

from collections.abc import Awaitable, Callable
from contextlib import suppress

import trio

from sagellm.runtime.comm.channel import Channel, ChannelClosed
from sagellm.runtime.comm.protocol import (
    Advanced,
    AskCache,
    CacheNews,
    Cancel,
    Done,
    Drop,
    Events,
    Export,
    Exported,
    ExportPart,
    FromWorker,
    Grant,
    GrantCache,
    Hold,
    Idle,
    Import,
    Landing,
    Ping,
    Pong,
    Ready,
    Receive,
    ReceivePart,
    Refused,
    Release,
    Stop,
    Submit,
)
from sagellm.runtime.engine.local import LocalEngine
from sagellm.runtime.engine.remote_transfer import LEASE_S
from sagellm.runtime.kv.cache_log import CacheLog
from sagellm.runtime.kv.transfer import PoolSource
from sagellm.runtime.messages import LeaseRef
from sagellm.runtime.port import DamagedBlocks, EngineRefusal, Lost, StaleLease

WINDOW = 4  # batches of events under way to one reader; reports of prefix blocks, too


class EngineServer:
    """Runs `engine` until it is told to stop, or its channel ends."""

    def __init__(self, engine: LocalEngine, channel: Channel) -> None:
        self._engine = engine
        self._channel = channel
        self._scopes: dict[int, trio.CancelScope] = {}  # of calls that may wait
        self._cache_log: CacheLog | None = None
        self._cache_window = WINDOW
        self._windows: dict[str, trio.Semaphore] = {}
        self._sources: dict[LeaseRef, PoolSource] = {}
        self._expiries_s: dict[LeaseRef, float] = {}

    async def run(self) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._engine.run)
            nursery.start_soon(self._engine.serve_blocks)
            self._engine.tell_advances(
                lambda lease, count: self._say(Advanced(lease=lease, num_blocks=count))
            )
            self._channel.put(Ready(facts=self._engine.facts))
            with suppress(ChannelClosed):  # nobody is left to serve
                while not isinstance(message := await self._channel.receive(), Stop):
                    await self._obey(message, nursery)
            nursery.cancel_scope.cancel()

    async def _obey(self, message: object, nursery: trio.Nursery) -> None:
        engine = self._engine
        match message:
            case Submit(call=call, state=state):
                if state.owner not in self._windows:
                    self._windows[state.owner] = trio.Semaphore(WINDOW)
                    nursery.start_soon(self._forward, state.owner)
                await self._answer(call, lambda: self._submit(call, message))
            case Cancel(request_id=request_id, choice=choice, epoch=epoch):
                engine.cancel(request_id, choice, epoch)
            case Grant(owner=owner) if owner in self._windows:
                self._windows[owner].release()
            case AskCache():
                self._cache_log = engine.cache.open_log(self._say_cache)
                self._say_cache()
            case GrantCache():
                self._cache_window += 1
                self._say_cache()
            case Export(call=call):
                nursery.start_soon(self._answer, call, lambda: self._export(message, nursery))
            case ExportPart(call=call):
                nursery.start_soon(self._answer, call, lambda: self._export_part(message))
            case Hold(lease=lease):
                if lease in self._expiries_s:
                    self._expiries_s[lease] = trio.current_time() + LEASE_S
            case Release(lease=lease):
                self._release(lease)
            case Import(call=call):
                nursery.start_soon(self._answer, call, lambda: self._import(message))
            case Receive(call=call):
                nursery.start_soon(self._answer, call, lambda: self._receive(message))
            case ReceivePart(call=call):
                nursery.start_soon(self._answer, call, lambda: self._receive_part(message))
            case Idle(call=call):
                nursery.start_soon(self._answer, call, lambda: self._idle(call))
            case Drop(call=call):
                if call in self._scopes:
                    self._scopes[call].cancel()
            case Ping():
                engine.forget_gone()
                self._say(self._pong())

    async def _answer(self, call: int, action: Callable[[], Awaitable[FromWorker]]) -> None:
        """Say what became of a call: every one is answered once, dropped ones too."""
        answer: FromWorker = Refused(call=call, kind="refusal", error="the call was dropped")
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

    async def _import(self, message: Import) -> Landing:
        target = await self._engine.import_(message.offer)
        return Landing(call=message.call, lease=target.lease)

    async def _export(self, message: Export, nursery: trio.Nursery) -> Exported:
        lease = message.lease
        source = self._engine.export(lease)
        self._sources[lease] = source
        self._expiries_s[lease] = trio.current_time() + LEASE_S
        nursery.start_soon(self._expire, lease)
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

    def _pong(self) -> Pong:
        engine = self._engine
        return Pong(
            load=engine.load,
            health=engine.health,
            step_tokens=tuple(engine.step_tokens.counts),
            num_step_tokens=engine.step_tokens.total,
        )

    async def _idle(self, call: int) -> Done:
        await self._engine.idle()
        self._say(self._pong())
        return Done(call=call)

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

    async def _forward(self, owner: str) -> None:
        """The events of one owner, as fast as its reader takes them."""
        async for events in self._engine.events(owner):
            await self._windows[owner].acquire()
            told = tuple(event for event in events if not isinstance(event, Lost))
            self._say(Events(owner=owner, events=told, load=self._engine.load))

    def _say_cache(self) -> None:
        """Say which prefix blocks have changed, as fast as that is read."""
        assert self._cache_log is not None
        while self._cache_window and (report := self._cache_log.take()) is not None:
            self._cache_window -= 1
            self._say(CacheNews(**report._asdict()))

    def _say(self, message: FromWorker) -> None:
        with suppress(ChannelClosed):  # whoever receives from it learns so, too
            self._channel.put(message)
