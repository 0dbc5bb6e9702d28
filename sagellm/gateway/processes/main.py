"""What a gateway's process runs: the app and its server, before a door to the graph's process."""

import gc
import os
import signal
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from socket import socket
from typing import Any

import anyio
import msgspec
from anyio.abc import TaskGroup, UNIXSocketStream

from sagellm.gateway.app import App, build_app
from sagellm.gateway.budgets import Budgets, Tally, count_names
from sagellm.gateway.gateway import Gateway, Served
from sagellm.gateway.layers.access import tenants
from sagellm.gateway.processes.door import RemoteDoor
from sagellm.gateway.processes.link import Link, read_first
from sagellm.gateway.processes.messages import (
    Answered,
    Ask,
    Drain,
    Events,
    FromGraph,
    Idle,
    Leaving,
    Readied,
    Refused,
    Retire,
    Setup,
    Stop,
    Up,
)
from sagellm.gateway.processes.meters import RemoteMeters, counted
from sagellm.gateway.routes import PATHS
from sagellm.gateway.server.drain import CLOSE_S, ignore_noted
from sagellm.gateway.settings import Settings
from sagellm.graphs.text.codec import from_msgpack
from sagellm.logs import own_logs
from sagellm.models import Models, load_models
from sagellm.runtime.cluster.lifeline import hold_lifeline

_VARIABLE = "SAGELLM_GATEWAY"


@dataclass(frozen=True, slots=True)
class Start:
    """Descriptors: the link to the graph's process, the socket that is served, the table of counts;
    and which of its rows is this gateway's.
    """

    door: int
    listener: int
    tally: int
    num_rows: int
    row: int

    @property
    def env(self) -> Mapping[str, str]:
        return {_VARIABLE: msgspec.json.encode(self).decode()}

    @property
    def files(self) -> tuple[int, ...]:
        return self.door, self.listener, self.tally

    @classmethod
    def read(cls) -> "Start":
        return msgspec.json.decode(os.environ.pop(_VARIABLE), type=cls)


def tally_names(settings: Settings) -> tuple[str, ...]:
    """The columns of the table: calls under way, and what each tenant has."""
    return "calls", *(name for tenant in tenants(settings) for name in count_names(tenant))


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
    ignore_noted()
    door = socket(fileno=start.door)
    setup = read_first(door, Setup)
    settings = setup.settings
    known = (*settings.api_keys.values(), settings.admin_key or "")
    backend, options, module, name = _SERVERS[settings.server]
    make_server = getattr(import_module(module), name)
    form = setup.log_format
    with own_logs(setup.log_level, key=settings.salt_key, known=known, form=form):
        run = partial(_run, setup, start, door, make_server)
        is_done = anyio.run(run, backend=backend, backend_options=options)
    sys.exit(not is_done)


async def _run(
    setup: Setup, start: Start, door_socket: socket, make_server: Callable[..., Any]
) -> bool:
    async with await UNIXSocketStream.from_socket(door_socket) as stream:
        link: Link[FromGraph] = Link(stream, FromGraph)
        models = load_models(from_msgpack(setup.graph))
        gateway = _gateway(setup, start, link, models)
        app = build_app(gateway)
        server = make_server(app, setup.settings, socket(fileno=start.listener))
        with models.kept():
            return await _Serving(app, server, link).run()


def _gateway(setup: Setup, start: Start, link: Link[FromGraph], models: Models) -> Gateway:
    settings = setup.settings
    tally = Tally(start.tally, start.num_rows, tally_names(settings))
    count = partial(tally.count, row=start.row)
    graph = from_msgpack(setup.graph)
    door = RemoteDoor(link, settings.streaming)
    return Gateway(
        settings=settings,
        door=door,
        models=tuple(
            Served(card, model.tokenizer)
            for card, model in zip(setup.models, models.all, strict=True)
        ),
        readiness=Told(setup.is_ready, setup.not_ready_reason),
        budgets=Budgets(settings.common_budget, count=count, own=settings.budgets),
        meters=RemoteMeters(door, PATHS),
        graph=graph,
        is_draining=setup.is_draining,
        num_calls=count("calls"),
    )


class _Serving:
    """Serves until the graph says so or is gone; or it is retired, and all connections are done."""

    def __init__(self, app: App, server: Any, link: Link[FromGraph]) -> None:
        self._app = app
        self._server = server
        self._link = link
        self._stopped = anyio.Event()
        self._over = anyio.Event()
        self._is_done = False

    async def run(self) -> bool:
        """Whether it ends because it was told to."""
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(self._link.send)
            await tasks.start(self._serve)
            if self._app.gateway.settings.server == "hypercorn":  # uvicorn runs it itself
                tasks.start_soon(self._meters.watch_app_loop)
            gc.collect()
            gc.freeze()  # what was loaded stays: no collection walks it again
            self._link.put(Up())
            tasks.start_soon(self._ask_at_signal)
            tasks.start_soon(self._obey, tasks)
            await self._over.wait()
            self._server.stop()
            with anyio.move_on_after(CLOSE_S):
                await self._stopped.wait()
                self._link.put(counted(self._meters))
                await self._link.flush()
            tasks.cancel_scope.cancel()
        return self._is_done

    async def _serve(self, *, task_status: anyio.abc.TaskStatus[None]) -> None:
        try:
            await self._server.run(task_status)
        finally:
            self._stopped.set()

    async def _ask_at_signal(self) -> None:
        with anyio.open_signal_receiver(signal.SIGTERM, signal.SIGQUIT) as signals:
            async for _ in signals:
                self._link.put(Leaving())

    async def _retire(self) -> None:
        """Others take new connections meanwhile."""
        self._server.stop()
        await self._stopped.wait()
        self._is_done = True
        self._over.set()

    def _drain(self) -> None:
        self._app.gateway.is_draining = True
        self._app.calls.when_idle(lambda: self._link.put(Idle()))

    @property
    def _meters(self) -> RemoteMeters:
        assert isinstance(self._app.gateway.meters, RemoteMeters)
        return self._app.gateway.meters

    async def _obey(self, tasks: TaskGroup) -> None:
        """Until told to stop, or nobody tells anything any more."""
        door, readiness = self._app.gateway.door, self._app.gateway.readiness
        assert isinstance(door, RemoteDoor)
        assert isinstance(readiness, Told)
        if self._app.gateway.is_draining:
            self._drain()
        try:
            async for message in self._link.messages():
                if isinstance(message, Events | Refused | Answered):
                    door.hear(message)
                elif isinstance(message, Ask):
                    self._link.put(counted(self._meters, message.number))
                elif isinstance(message, Readied):
                    readiness.is_ready, readiness.reason = message.is_ready, message.reason
                elif isinstance(message, Drain):
                    self._drain()
                elif isinstance(message, Retire):
                    tasks.start_soon(self._retire)
                elif isinstance(message, Stop):
                    self._is_done = True
                    break
        finally:
            door.close()
            self._over.set()


if __name__ == "__main__":
    main()
