"""What a gateway's process runs: the app and its server, before a door to the graph's process."""

import gc
import signal
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from socket import socket
from typing import Any

import anyio
from anyio.abc import UNIXSocketStream

from sagellm.engines import load_tokenizer_of
from sagellm.gateway.app import App, build_app
from sagellm.gateway.budgets import Budgets
from sagellm.gateway.count import Tally
from sagellm.gateway.gateway import Gateway
from sagellm.gateway.processes.door import RemoteDoor
from sagellm.gateway.processes.link import Link, read_first
from sagellm.gateway.processes.messages import (
    Answered,
    Ask,
    Drain,
    Events,
    FromGraph,
    Idle,
    Readied,
    Refused,
    Setup,
    Stop,
    Up,
)
from sagellm.gateway.processes.meters import RemoteMeters, counted
from sagellm.gateway.processes.start import Start, tally_names
from sagellm.gateway.routes import PATHS
from sagellm.gateway.server.drain import CLOSE_S
from sagellm.graphs.text.codec import from_msgpack
from sagellm.logs import own_logs
from sagellm.runtime.cluster.lifeline import hold_lifeline

_SERVERS = {  # the loop that each runs on, and what it is there
    "hypercorn": ("trio", {}, "sagellm.gateway.server.hypercorn", "HypercornServer"),
    "uvicorn": (
        "asyncio",
        {"use_uvloop": True},
        "sagellm.gateway.server.uvicorn",
        "UvicornOnItsLoop",
    ),
}


@dataclass
class Told:
    """Readiness as the graph's process tells it."""

    is_ready: bool
    reason: str


def main() -> None:
    start = Start.read()
    hold_lifeline()
    door = socket(fileno=start.door)
    setup = read_first(door, Setup)
    settings = setup.settings
    known = (*settings.api_keys.values(), settings.admin_key or "")
    backend, options, module, name = _SERVERS[settings.server]
    make_server = getattr(import_module(module), name)
    with own_logs(setup.log_level, key=settings.salt_key, known=known):
        run = partial(_run, setup, start, door, make_server)
        anyio.run(run, backend=backend, backend_options=options)


async def _run(
    setup: Setup, start: Start, door_socket: socket, make_server: Callable[..., Any]
) -> None:
    async with await UNIXSocketStream.from_socket(door_socket) as stream:
        link: Link[FromGraph] = Link(stream, FromGraph)
        gateway = _gateway(setup, start, link)
        app = build_app(gateway)
        server = make_server(app, setup.settings, socket(fileno=start.listener))
        await _Serving(app, server, link).run()


def _gateway(setup: Setup, start: Start, link: Link[FromGraph]) -> Gateway:
    settings = setup.settings
    tally = Tally(start.tally, start.num_rows, tally_names(settings))
    count = partial(tally.count, row=start.row)
    graph = from_msgpack(setup.graph)
    door = RemoteDoor(link, settings.streaming)
    return Gateway(
        settings=settings,
        door=door,
        tokenizer=load_tokenizer_of(graph),
        model=setup.model,
        readiness=Told(setup.is_ready, setup.not_ready_reason),
        budgets=Budgets(settings.budget, count=count),
        meters=RemoteMeters(door, PATHS),
        graph=graph,
        num_calls=count("calls"),
    )


class _Serving:
    """Serves until the graph says so or is gone; or SIGTERM came, and all connections are done."""

    def __init__(self, app: App, server: Any, link: Link[FromGraph]) -> None:
        self._app = app
        self._server = server
        self._link = link
        self._stopped = anyio.Event()

    async def run(self) -> None:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(self._link.send)
            await tasks.start(self._serve)
            if self._app.gateway.settings.server == "hypercorn":  # uvicorn runs it itself
                tasks.start_soon(self._app.gateway.meters.watch_app_loop)
            gc.collect()
            gc.freeze()  # what was loaded stays: no collection walks it again
            self._link.put(Up())
            tasks.start_soon(self._leave_at_signal, tasks.cancel_scope)
            await self._obey()
            self._server.stop()
            with anyio.move_on_after(CLOSE_S):
                await self._stopped.wait()
            tasks.cancel_scope.cancel()

    async def _serve(self, *, task_status: anyio.abc.TaskStatus[None]) -> None:
        try:
            await self._server.run(task_status)
        finally:
            self._stopped.set()

    async def _leave_at_signal(self, scope: anyio.CancelScope) -> None:
        """Others take new connections meanwhile, and another takes its place."""
        with anyio.open_signal_receiver(signal.SIGTERM) as signals:
            async for _ in signals:
                self._server.stop()
                await self._stopped.wait()
                scope.cancel()

    async def _obey(self) -> None:
        """Until told to stop, or nobody tells anything any more."""
        gateway = self._app.gateway
        door, meters, readiness = gateway.door, gateway.meters, gateway.readiness
        assert isinstance(door, RemoteDoor)
        assert isinstance(meters, RemoteMeters)
        assert isinstance(readiness, Told)
        try:
            async for message in self._link.messages():
                if isinstance(message, Events | Refused | Answered):
                    door.hear(message)
                elif isinstance(message, Ask):
                    self._link.put(counted(meters, message.number))
                elif isinstance(message, Readied):
                    readiness.is_ready, readiness.reason = message.is_ready, message.reason
                elif isinstance(message, Drain):
                    gateway.is_draining = True
                    self._app.calls.when_idle(lambda: self._link.put(Idle()))
                elif isinstance(message, Stop):
                    return
        finally:
            door.close()


if __name__ == "__main__":
    main()
