"""A served session in this trio loop, whose blocks, tasks and files can be counted."""

import gc
import socket
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from os import listdir
from types import MappingProxyType
from typing import Any

import psutil
import trio
from gateway_served import GATEWAYS, get, read_reply

from sagellm import Graph
from sagellm.gateway.lifecycle import serve_session
from sagellm.gateway.settings import Budget, Settings, bind
from sagellm.runtime.engine.local_engine import LocalEngine
from sagellm.session import Session

ANY = Budget(num_open=4096, num_waiting=4096, cancels_per_s=1e6)  # of one key


@dataclass(frozen=True)
class Held:
    """What this process holds."""

    num_tasks: int
    num_files: int
    sockets: Mapping[str, int]  # by state, those that are over left out


def held() -> Held:
    states = [one.status for one in psutil.Process().net_connections("tcp")]
    return Held(
        num_tasks=trio.lowlevel.current_statistics().tasks_living,
        num_files=len(listdir("/proc/self/fd")),
        sockets=Counter(states),
    )


@dataclass
class ServedSession:
    """One gateway under way, before a graph of null engines."""

    session: Session
    port: int
    signals: trio.MemorySendChannel[int]
    is_signalled: bool = False

    def signal(self) -> None:
        """What SIGTERM does."""
        self.signals.send_nowait(15)
        self.is_signalled = True

    @property
    def engines(self) -> list[LocalEngine]:
        found = self.session.executor.all_engines
        return [engine for engine in found if isinstance(engine, LocalEngine)]

    @property
    def is_at_rest(self) -> bool:
        """No request is open, and every block is free; the books balance."""
        if not self.session.executor.core.register.is_empty or self.session.health().num_open:
            return False
        self.session.executor.core.ledger.check()
        pools = [engine.pool for engine in self.engines]
        return all(pool.num_available == pool.num_blocks for pool in pools)

    def on_free(self, tell: Callable[[], None]) -> None:
        """Call `tell` whenever blocks became free."""
        for engine in self.engines:
            engine.pool.on_free = _both(engine.pool.on_free, tell)

    async def connect(self) -> trio.SocketStream:
        return await trio.open_tcp_stream("127.0.0.1", self.port)

    async def is_answering(self) -> bool:
        async with await self.connect() as stream:
            await stream.send_all(get("/live", "Connection: close"))
            return (await read_reply(stream)).status == 200


@asynccontextmanager
async def late_wakes() -> AsyncIterator[list[float]]:
    """How late this loop wakes a sleeper, in seconds, again and again until the block ends."""
    found: list[float] = []

    async def watch() -> None:
        while True:
            due_s = trio.current_time() + 0.005
            await trio.sleep_until(due_s)
            found.append(trio.current_time() - due_s)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(watch)
        yield found
        nursery.cancel_scope.cancel()


@contextmanager
def frozen_heap() -> Iterator[None]:
    """As `sagellm serve` does, so that no full collection walks all that tests have loaded."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def _both(first: Callable[[], None], second: Callable[[], None]) -> Callable[[], None]:
    def call() -> None:
        first()
        second()

    return call


@asynccontextmanager
async def served_session(
    server: str,
    graph: str,
    options: Mapping[str, Any],
    send_bytes: int = 0,
    opened: Mapping[str, Any] = MappingProxyType({}),
    **fields: Any,
) -> AsyncIterator[ServedSession]:
    """A graph by name, `options` set in it, behind a server; drained at the end.

    `opened`: how the graph is opened beside that; `fields` are those of the settings.

    `send_bytes`: what the kernel holds of an answer that is not read; 0: megabytes.
    """
    known: dict[str, Any] = {"budget": ANY, "num_gateways": GATEWAYS, **fields}
    settings = Settings(server=server, port=0, served_models=("m",), **known)  # type: ignore[arg-type]
    send, signals = trio.open_memory_channel[int](2)
    started = trio.Event()
    with bind("127.0.0.1", 0) as sock:
        if send_bytes:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, send_bytes)
        async with (
            Graph.load(graph).open(set=options, **opened) as session,
            trio.open_nursery() as nursery,
        ):
            nursery.start_soon(
                serve_session, session, settings, sock, signals, lambda line: started.set()
            )
            await started.wait()
            with frozen_heap():
                served = ServedSession(session, sock.getsockname()[1], send)
                yield served
            if not served.is_signalled:
                served.signal()
