"""The worker's half of the engine port: does what a channel asks of one engine, of any kind."""

from collections.abc import Awaitable, Callable
from contextlib import suppress

import trio

from sagellm.runtime.cache_changes import ReportsCache
from sagellm.runtime.comm.channel import Channel, ChannelClosed
from sagellm.runtime.comm.protocol import (
    AskCache,
    CacheNews,
    Cancel,
    Done,
    Drop,
    Events,
    FromWorker,
    Grant,
    GrantCache,
    Idle,
    Ping,
    Pong,
    Ready,
    Refused,
    Stop,
    Submit,
)
from sagellm.runtime.engine.cache_reporting import open_cache_log
from sagellm.runtime.engine.kv_serving import KVServer, SharedKVEngine
from sagellm.runtime.kv.cache_log import CacheLog
from sagellm.runtime.port import (
    CountingSteps,
    DamagedBlocks,
    Engine,
    EngineRefusal,
    Lost,
    StaleLease,
    moves_kv,
)

WINDOW = 4  # batches of events under way to one reader; reports of prefix blocks, too


class EngineServer:
    """Runs `engine` until it is told to stop, or its channel ends."""

    def __init__(self, engine: Engine, channel: Channel) -> None:
        self._engine = engine
        self._channel = channel
        self._scopes: dict[int, trio.CancelScope] = {}  # of calls that may wait
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
            with suppress(ChannelClosed):  # nobody is left to serve
                while not isinstance(message := await self._channel.receive(), Stop):
                    await self._obey(message, nursery)
            nursery.cancel_scope.cancel()

    async def _obey(self, message: object, nursery: trio.Nursery) -> None:
        match message:
            case Submit(call=call, state=state):
                if state.owner not in self._windows:
                    self._windows[state.owner] = trio.Semaphore(WINDOW)
                    nursery.start_soon(self._forward, state.owner)
                await self._answer(call, lambda: self._submit(call, message))
            case Cancel(request_id=request_id, choice=choice, epoch=epoch):
                self._engine.cancel(request_id, choice, epoch)
            case Grant(owner=owner) if owner in self._windows:
                self._windows[owner].release()
            case AskCache() if isinstance(self._engine, ReportsCache):
                self._cache_log = open_cache_log(self._engine, self._say_cache)
                self._say_cache()
            case GrantCache():
                self._cache_window += 1
                self._say_cache()
            case Idle(call=call):
                nursery.start_soon(self._answer, call, lambda: self._idle(call))
            case Drop(call=call):
                if call in self._scopes:
                    self._scopes[call].cancel()
            case Ping():
                if self._kv is not None:
                    self._kv.forget_gone()
                self._say(self._pong())
            case _ if self._kv is not None:
                self._obey_kv(self._kv, message, nursery)

    def _obey_kv(self, server: KVServer, message: object, nursery: trio.Nursery) -> None:
        action = server.action(message)
        if action is not None:
            nursery.start_soon(self._answer, *action)

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


def _kv_server(engine: Engine, say: Callable[[FromWorker], None]) -> KVServer | None:
    """Raises TypeError where the engine says that it can move KV blocks, and has not what a worker
    needs for it.
    """
    if not moves_kv(engine):
        return None
    if not isinstance(engine, SharedKVEngine):
        raise TypeError(f"{type(engine).__name__} cannot move KV blocks between processes")
    return KVServer(engine, say)
