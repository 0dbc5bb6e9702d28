"""A gateway on a real socket: in this trio loop before a scripted bridge, or in a thread before a
null engine; and a client that sends bytes as they are.
"""

import json
import os
import socket
import threading
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import anyio
import anyio.lowlevel
import h11
import pytest
import trio
from gateway_calls import event, gateway_before, last
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from sagellm import Graph, ops
from sagellm.gateway.gateway import Gateway
from sagellm.gateway.graph_bridge import NOW
from sagellm.gateway.http.app import App
from sagellm.gateway.http.call import EndpointRoute
from sagellm.gateway.http.drain import HttpServer, ServingHere, serve
from sagellm.gateway.http.routes import ROUTES
from sagellm.gateway.lifecycle import serve_session, server_class
from sagellm.gateway.settings import Settings, bind
from sagellm.runtime.messages import Request as GraphRequest
from sagellm.runtime.messages import TokenEvent
from sagellm.session.requests import Timing

SERVERS = ("hypercorn", "uvicorn")
# For long tests: `make soak` runs the other one.
DEFAULT_SERVER = ("hypercorn", pytest.param("uvicorn", marks=pytest.mark.soak))
GATEWAYS = int(os.environ.get("SAGELLM_TEST_GATEWAYS", "0"))  # processes; see conftest
KEYS = {"api_keys": {"alice": "user-key"}, "admin_key": "admin-key"}


class HeldBridge:
    """Each stream gets one token, and its end once it is let go. Lives on the app's loop."""

    def __init__(self) -> None:
        self.held: list[anyio.Event] = []
        self.reason = "stop"

    @asynccontextmanager
    async def open_stream(
        self, request: GraphRequest, timing: Timing = NOW
    ) -> AsyncIterator[AsyncIterator[Sequence[TokenEvent]]]:
        let_go = anyio.Event()
        self.held.append(let_go)
        yield self._batches(let_go)

    async def _batches(self, let_go: anyio.Event) -> AsyncIterator[Sequence[TokenEvent]]:
        yield [event("a")]
        await let_go.wait()
        yield [last("b", self.reason, code="" if self.reason == "stop" else "shutting_down")]

    async def cancel(self, request_id: str) -> bool:
        return False

    async def cancel_elsewhere(self, call_id: str) -> bool:
        return False

    def let_go(self, reason: str) -> None:
        self.reason = reason
        for one in self.held:
            one.set()


@dataclass
class Served:
    """One gateway under way. `signal` is what SIGTERM does."""

    port: int
    app: App
    server: HttpServer
    bridge: HeldBridge
    signals: trio.MemorySendChannel[int]
    ended: trio.Event = field(default_factory=trio.Event)

    @property
    def gateway(self) -> Gateway:
        return self.app.gateway

    def signal(self) -> None:
        self.signals.send_nowait(15)

    async def let_go(self, reason: str = "stop") -> None:
        self.server.call_soon(self.bridge.let_go, reason)

    async def idle(self) -> None:
        """No call is open any more."""
        idle, token = trio.Event(), trio.lowlevel.current_trio_token()
        tell = partial(token.run_sync_soon, idle.set)
        self.server.call_soon(self.app.calls.when_idle, tell)
        with trio.fail_after(20):
            await idle.wait()

    async def connect(self) -> trio.SocketStream:
        return await trio.open_tcp_stream("127.0.0.1", self.port)

    async def ask(self, raw: bytes) -> "Reply":
        """One request on a connection of its own, and its whole answer."""
        async with await self.connect() as stream:
            await stream.send_all(raw)
            return await read_reply(stream)


@asynccontextmanager
async def serving(
    server: str, *, routes: Sequence[EndpointRoute] = (), **fields: Any
) -> AsyncIterator[Served]:
    """A gateway in this loop; killed at the end where it has not ended by itself."""
    bridge = HeldBridge()
    settings = Settings(server=server, port=0, served_models=("m",), **fields)  # type: ignore[arg-type]
    app = App(gateway_before(bridge, settings=settings), [*ROUTES, *routes])
    app.gateway.readiness.is_ready = True
    send, receive = trio.open_memory_channel[int](8)
    with bind("127.0.0.1", 0) as sock:
        running = server_class(server)(app, settings, sock)
        served = Served(sock.getsockname()[1], app, running, bridge, send)
        async with trio.open_nursery() as nursery:
            started = trio.Event()
            nursery.start_soon(_serve, served, receive, started)
            await started.wait()
            yield served
            nursery.cancel_scope.cancel()


async def _serve(served: Served, signals: AsyncIterator[int], started: trio.Event) -> None:
    async def end_streams() -> None:
        await served.let_go("cancelled")

    serving, settings = ServingHere(served.server, served.app), served.gateway.settings
    await serve(serving, settings, signals, end_streams, started.set)
    served.ended.set()


@dataclass
class Reply:
    """`is_whole`: it did not break off. `is_closed`: the server has closed behind it."""

    status: int = 0
    reason: str = ""
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""
    is_whole: bool = False

    @property
    def error(self) -> Any:
        return json.loads(self.body)["error"]


class _Reading:
    """Feeds bytes of one answer."""

    def __init__(self) -> None:
        self._connection = h11.Connection(h11.CLIENT)
        self._connection.send(h11.Request(method="GET", target="/", headers=[("host", "x")]))
        self._connection.send(h11.EndOfMessage())
        self.reply = Reply()

    def feed(self, data: bytes) -> bool:
        """Whether that was all."""
        self._connection.receive_data(data)
        while True:
            try:
                got = self._connection.next_event()
            except h11.RemoteProtocolError:
                return True
            if isinstance(got, h11.Response):
                self.reply.status, self.reply.reason = got.status_code, got.reason.decode()
                self.reply.headers = {key.decode(): value.decode() for key, value in got.headers}
            elif isinstance(got, h11.Data):
                self.reply.body += bytes(got.data)
            elif isinstance(got, h11.EndOfMessage):
                self.reply.is_whole = True
                return True
            elif not isinstance(got, h11.InformationalResponse):
                return not data


async def received(stream: trio.SocketStream) -> bytes:
    """The next bytes, which there must be."""
    data = bytes(await stream.receive_some())
    if not data:
        raise AssertionError("the server has closed")
    return data


async def first_token(stream: trio.SocketStream) -> None:
    """Wait for what a held stream begins with."""
    seen = b""
    while b'"text":"a"' not in seen:
        seen += await received(stream)


async def read_reply(stream: trio.abc.ReceiveStream) -> Reply:
    reading = _Reading()
    while True:
        try:
            data = bytes(await stream.receive_some())
        except trio.BrokenResourceError:
            return reading.reply
        if reading.feed(data):
            return reading.reply


class Endless(Response):
    """Sends until the client leaves."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        async with anyio.create_task_group() as sending:
            sending.start_soon(self._send, send)
            while (await receive())["type"] != "http.disconnect":
                pass
            sending.cancel_scope.cancel()

    async def _send(self, send: Send) -> None:
        chunk = {"type": "http.response.body", "body": b"x" * 65536, "more_body": True}
        while True:
            await anyio.lowlevel.checkpoint()
            await send(dict(chunk))


async def endless(gateway: Gateway, request: Request) -> Response:
    return Endless()


ENDLESS = EndpointRoute("GET", "/endless", endless)


def get(path: str, *headers: str) -> bytes:
    return b"\r\n".join(
        line.encode() for line in (f"GET {path} HTTP/1.1", "Host: localhost", *headers, "", "")
    )


def post(path: str, body: Any, *headers: str) -> bytes:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    first = (f"POST {path} HTTP/1.1", "Host: localhost", f"Content-Length: {len(content)}")
    return "\r\n".join((*first, *headers, "", "")).encode() + content


STREAM = post("/v1/completions", {"prompt": "x", "stream": True})


@contextmanager
def null_gateway(server: str, **fields: Any) -> Iterator[int]:
    """The port of a gateway before a null engine, in a thread of its own."""
    known: dict[str, Any] = {"num_gateways": GATEWAYS, **fields}
    settings = Settings(server=server, port=0, served_models=("m",), **known)  # type: ignore[arg-type]
    graph = Graph("g").engine("g", device="null", decode_step_s=0.0, prefill_token_s=0.0)
    graph >> ops.admission() >> ops.policy_sort() >> ops.generate(engine="g")
    send, receive = trio.open_memory_channel[int](8)
    started = threading.Event()
    tokens: list[trio.lowlevel.TrioToken] = []

    async def run() -> None:
        tokens.append(trio.lowlevel.current_trio_token())
        async with graph.open() as session:
            await serve_session(session, settings, sock, receive, lambda line: started.set())

    with bind("127.0.0.1", 0) as sock:
        port = sock.getsockname()[1]
        thread = threading.Thread(target=trio.run, args=(run,))
        thread.start()
        try:
            is_started = started.wait(30)  # apart: `python -O` leaves asserts of this file out
            assert is_started
            yield port
        finally:
            for _ in range(2):
                with suppress(trio.RunFinishedError):  # the first was enough
                    trio.from_thread.run_sync(send.send_nowait, 15, trio_token=tokens[0])
            thread.join(30)
            assert not thread.is_alive()


def ask(port: int, raw: bytes, timeout_s: float = 60.0) -> Reply:
    """One request of raw bytes from a plain thread, and its whole answer."""
    with socket.create_connection(("127.0.0.1", port), timeout_s) as sock:
        reading = _Reading()
        sender = threading.Thread(target=_send, args=(sock, raw))
        sender.start()
        try:
            while not reading.feed(data := _receive(sock)) and data:
                pass
            return reading.reply
        finally:
            sock.shutdown(socket.SHUT_RDWR) if sender.is_alive() else None
            sender.join()


def _send(sock: socket.socket, raw: bytes) -> None:
    try:
        sock.sendall(raw)
    except OSError:
        return  # refused before it was read


def _receive(sock: socket.socket) -> bytes:
    try:
        return sock.recv(1 << 16)
    except ConnectionResetError:
        return b""
