"""The main program of a gateway process: it serves the app, and obeys the graph's process."""

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

from sagellm.gateway.budgets import Budgets, SharedCounters, counter_names
from sagellm.gateway.gateway import Gateway, HostedModel
from sagellm.gateway.http.app import App, build_app
from sagellm.gateway.http.checks import tenants
from sagellm.gateway.http.drain import CLOSE_S, ignore_noted
from sagellm.gateway.http.routes import PATHS
from sagellm.gateway.processes.link import (
    Drained,
    GatewaySetup,
    MessageLink,
    QueryAnswer,
    ReadinessChanged,
    ReportCounters,
    Retire,
    RetireRequested,
    Shutdown,
    StartDrain,
    Started,
    StreamEvents,
    StreamRefused,
    ToGatewayMessage,
    read_first,
)
from sagellm.gateway.processes.process_bridge import ProcessBridge, RemoteMeters, counter_report
from sagellm.gateway.readiness import Readiness
from sagellm.gateway.settings import Settings
from sagellm.graphs.text.codec import from_msgpack
from sagellm.logs import process_logs
from sagellm.opening.tokenizers import load_models
from sagellm.runtime.cluster.child_process import end_with_parent
from sagellm.session.models import Models

_VARIABLE = "SAGELLM_GATEWAY"


@dataclass(frozen=True, slots=True)
class GatewayStart:
    """The parameters that a gateway process gets at its start, in an environment variable.

    `link`, `listener` and `counters` are inherited file descriptors: of the link, of the listening
    socket, and of the shared table of counters. `row` is the gateway's row of this table, which has
    `num_rows` rows.
    """

    link: int
    listener: int
    counters: int
    num_rows: int
    row: int

    @property
    def env(self) -> Mapping[str, str]:
        return {_VARIABLE: msgspec.json.encode(self).decode()}

    @property
    def files(self) -> tuple[int, ...]:
        """The file descriptors that the process must inherit."""
        return self.link, self.listener, self.counters

    @classmethod
    def read(cls) -> "GatewayStart":
        """Read the parameters from the environment, and remove them there."""
        return msgspec.json.decode(os.environ.pop(_VARIABLE), type=cls)


def counter_columns(settings: Settings) -> tuple[str, ...]:
    """Return the columns of the table of counters: open calls, and two counters a tenant."""
    return "calls", *(name for tenant in tenants(settings) for name in counter_names(tenant))


_SERVERS = {  # server -> (backend of anyio, its options, module, class)
    "hypercorn": ("trio", {}, "sagellm.gateway.http.hypercorn", "HypercornServer"),
    "uvicorn": (
        "asyncio",
        {"use_uvloop": True},
        "sagellm.gateway.http.uvicorn",
        "UvicornOnItsLoop",
    ),
}


def main() -> None:
    start = GatewayStart.read()
    end_with_parent()
    ignore_noted()
    link = socket(fileno=start.link)
    setup = read_first(link, GatewaySetup)  # before a loop runs: the settings choose the loop
    settings = setup.settings
    known = (*settings.api_keys.values(), settings.admin_key or "")  # secrets; logs redact them
    backend, options, module, name = _SERVERS[settings.server]
    make_server = getattr(import_module(module), name)
    form = setup.log_format
    with process_logs(setup.log_level, key=settings.salt_key, known=known, form=form):
        run = partial(_run, setup, start, link, make_server)
        is_done = anyio.run(run, backend=backend, backend_options=options)
    sys.exit(not is_done)


async def _run(
    setup: GatewaySetup, start: GatewayStart, link_socket: socket, make_server: Callable[..., Any]
) -> bool:
    async with await UNIXSocketStream.from_socket(link_socket) as stream:
        link: MessageLink[ToGatewayMessage] = MessageLink(stream, ToGatewayMessage)
        models = load_models(from_msgpack(setup.graph))
        gateway = _gateway(setup, start, link, models)
        app = build_app(gateway)
        server = make_server(app, setup.settings, socket(fileno=start.listener))
        with models.kept():
            return await _Serving(app, server, link).run()


def _gateway(
    setup: GatewaySetup, start: GatewayStart, link: MessageLink[ToGatewayMessage], models: Models
) -> Gateway:
    settings = setup.settings
    counters = SharedCounters(start.counters, start.num_rows, counter_columns(settings))
    count = partial(counters.count, row=start.row)
    graph = from_msgpack(setup.graph)
    bridge = ProcessBridge(link, settings.streaming)
    return Gateway(
        settings=settings,
        bridge=bridge,
        models=tuple(
            HostedModel(card, model.tokenizer)
            for card, model in zip(setup.models, models.all, strict=True)
        ),
        readiness=Readiness(setup.is_ready, setup.not_ready_reason),
        budgets=Budgets(settings.common_budget, count=count, own=settings.budgets),
        meters=RemoteMeters(bridge, PATHS),
        graph=graph,
        is_draining=setup.is_draining,
        num_calls=count("calls"),
    )


class _Serving:
    """Serves until a `Shutdown`, a completed `Retire`, or the end of the graph's process."""

    def __init__(self, app: App, server: Any, link: MessageLink[ToGatewayMessage]) -> None:
        self._app = app
        self._server = server
        self._link = link
        self._stopped = anyio.Event()
        self._over = anyio.Event()
        self._is_done = False

    async def run(self) -> bool:
        """Serve. Return whether the end was requested; False if the graph's process has ended."""
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(self._link.send)
            await tasks.start(self._serve)
            if self._app.gateway.settings.server == "hypercorn":  # uvicorn's config starts its own
                tasks.start_soon(self._app.run_background)
            gc.collect()
            gc.freeze()  # loaded objects live until the end, so collections need not scan them
            self._link.put(Started())
            tasks.start_soon(self._ask_at_signal)
            tasks.start_soon(self._obey, tasks)
            await self._over.wait()
            self._server.stop()
            with anyio.move_on_after(CLOSE_S):
                await self._stopped.wait()
                self._link.put(counter_report(self._meters))
                await self._link.flush()
            tasks.cancel_scope.cancel()
        return self._is_done

    async def _serve(self, *, task_status: anyio.abc.TaskStatus[None]) -> None:
        try:
            await self._server.run(task_status)
        finally:
            self._stopped.set()

    async def _ask_at_signal(self) -> None:
        """Request a `Retire` at each SIGTERM or SIGQUIT. The graph's process decides."""
        with anyio.open_signal_receiver(signal.SIGTERM, signal.SIGQUIT) as signals:
            async for _ in signals:
                self._link.put(RetireRequested())

    async def _retire(self) -> None:
        """Finish the open connections, then end. Other processes accept new connections."""
        self._server.stop()
        await self._stopped.wait()
        self._is_done = True
        self._over.set()

    def _drain(self) -> None:
        """Refuse new calls, and send `Drained` when no call is open."""
        self._app.gateway.is_draining = True
        self._app.calls.when_idle(lambda: self._link.put(Drained()))

    @property
    def _meters(self) -> RemoteMeters:
        assert isinstance(self._app.gateway.meters, RemoteMeters)
        return self._app.gateway.meters

    async def _obey(self, tasks: TaskGroup) -> None:
        """Handle messages until `Shutdown`, or until the link is broken."""
        bridge, readiness = self._app.gateway.bridge, self._app.gateway.readiness
        assert isinstance(bridge, ProcessBridge)
        if self._app.gateway.is_draining:
            self._drain()
        try:
            async for message in self._link.messages():
                if isinstance(message, StreamEvents | StreamRefused | QueryAnswer):
                    bridge.handle(message)
                elif isinstance(message, ReportCounters):
                    self._link.put(counter_report(self._meters, message.number))
                elif isinstance(message, ReadinessChanged):
                    readiness.change(message.is_ready, message.reason)
                elif isinstance(message, StartDrain):
                    self._drain()
                elif isinstance(message, Retire):
                    tasks.start_soon(self._retire)
                elif isinstance(message, Shutdown):
                    self._is_done = True
                    break
        finally:
            bridge.close()
            self._over.set()


if __name__ == "__main__":
    main()
