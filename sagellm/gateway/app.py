"""The ASGI application: every call passes the same layers, in this order, on trio and asyncio."""

from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from dataclasses import replace

import anyio
from starlette.requests import Request
from starlette.types import Message, Receive, Scope, Send

from sagellm.gateway.call import Call, OpenCalls, call_fields, echo, new_call
from sagellm.gateway.errors import (
    draining,
    failure_of,
    is_too_late,
    note_error,
    objective_of,
    response_of,
    shed,
)
from sagellm.gateway.gateway import Gateway
from sagellm.gateway.layers.access import Hosts, Keys, check_headers
from sagellm.gateway.layers.body import Bodies, Body, check_body
from sagellm.gateway.routes import routes_of
from sagellm.gateway.routing import Route, Table
from sagellm.graphs.log import get_logger

LOG = get_logger("sagellm.gateway")
CLIENT_LEFT = 499
PIECE_BYTES = 64 << 10


def build_app(gateway: Gateway) -> "App":
    """The app of one open graph, with all routes that its settings allow."""
    return App(gateway, routes_of(gateway.settings))


class App:
    """Answers HTTP; refuses WebSockets. `calls` are those that a drain waits for. `generating`: the
    paths of calls that generate, by their bytes.
    """

    def __init__(self, gateway: Gateway, routes: Iterable[Route]) -> None:
        self.gateway = gateway
        self.table = Table(routes)
        self.calls = OpenCalls(gateway.num_calls)
        self.bodies = Bodies(gateway.settings.limits)
        self._hosts = Hosts(gateway.settings)
        self._keys = Keys(gateway.settings)
        self.objective_s = objective_of(gateway.graph)
        self.generating = {
            route.path.encode(): route.path
            for route in self.table.routes
            if route.generates and route.method == "POST"
        }

    @property
    def lag_s(self) -> float:
        """How late the loop is now."""
        return self.gateway.meters.app_lag_s()

    @property
    def is_too_late(self) -> bool:
        """Whether the loop is too late to serve a call."""
        return is_too_late(self.lag_s, self.objective_s)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            await self._http(scope, receive, send)
        elif scope["type"] == "websocket":
            await receive()
            await send({"type": "websocket.close", "code": 1008})
        else:
            await _lifespan(receive, send)

    async def _http(self, scope: Scope, receive: Receive, send: Send) -> None:
        call = new_call(scope)
        route = self.table.find(scope)
        limits = self.gateway.settings.limits
        body = Body(scope, receive, limits, call.started_s, self.bodies)
        sending = _Sending(send, call, body)
        scope["state"] = {"call": call, "calls": self.calls, "body": body}
        self.gateway.meters.request_started(route.path, scope["method"])
        try:
            with nullcontext() if route.while_draining else self.calls.open():
                await self._answer(route, scope, body, sending)
        finally:
            self._ended(route, scope, sending)

    async def _answer(self, route: Route, scope: Scope, body: Body, sending: "_Sending") -> None:
        """An answer that fails once it has begun is cut off: it never ends as if it were whole."""
        try:
            self._check(route, scope)
            request = Request(scope, body.receive, sending.send)
            response = await route.endpoint(self.gateway, request)
            await response(scope, body.receive, sending.send)
        except Exception as error:
            refusal = failure_of(error, sending.call.request_id)
            body.drop()  # before the answer: to read what is left of the body may take long
            if refusal is not None and not sending.status:
                note_error(scope, refusal)
                await response_of(refusal)(scope, body.receive, sending.send)
        finally:
            body.drop()

    def _check(self, route: Route, scope: Scope) -> None:
        """All that can be said before the body is read. Raises ApiError."""
        settings = self.gateway.settings
        check_headers(scope, settings.limits)
        self._hosts.check(scope)
        caller = self._keys.caller(scope, route.access)
        state = scope["state"]
        state["call"] = replace(state["call"], tenant=caller.tenant, is_admin=caller.is_admin)
        if self.gateway.is_draining and not route.while_draining:
            raise draining()
        if route.generates:
            self._shed(caller.tenant)
        check_body(scope, settings.limits, self.bodies)

    def _shed(self, tenant: str) -> None:
        """Raises ApiError where the loop is too late to serve a call."""
        if self.is_too_late:
            raise shed(self.lag_s, should_retry=self.gateway.budgets.may_retry(tenant))

    def _ended(self, route: Route, scope: Scope, sending: "_Sending") -> None:
        call, method, status = scope["state"]["call"], scope["method"], sending.end_status
        now = anyio.current_time()
        self.gateway.meters.request_ended(route.path, method, status, now - call.started_s)
        LOG.info("call_ended", **call_fields(call, scope, status, now), route=route.path)


class _Sending:
    """Wraps `send`. `status` is 0 until an answer has begun."""

    def __init__(self, send: Send, call: Call, body: Body) -> None:
        self._send = send
        self._body = body
        self._is_whole = False
        self.call = call
        self.status = 0

    @property
    def end_status(self) -> int:
        return self.status if self._is_whole else CLIENT_LEFT

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            message["headers"] = [*message.get("headers", ()), *echo(self.call)]
            await self._send(message)
            return
        *parts, last = _parts(message)
        for part in parts:
            await self._send(part)
        if last.get("more_body", False):
            await self._send(last)
            return
        self._is_whole = True  # before: servers end a call while its last send is under way
        await self._send_last(last)

    async def _send_last(self, message: Message) -> None:
        """Hypercorn makes its connection ready for the next call in here, and tells the app that
        the client has gone: who is cancelled by that would leave it half made, and for ever open.

        Servers hand out the end of an answer only while somebody reads the rest of the body.
        """
        with anyio.CancelScope(shield=True):  # bounded: a client that does not read is cut off
            if self._body.is_whole:
                await self._send(message)
                return
            async with anyio.create_task_group() as reading:
                reading.start_soon(self._body.discard)
                await self._send(message)
                reading.cancel_scope.cancel()


def _parts(message: Message) -> Iterator[Message]:
    """A large body in pieces: a client has the servers' time for each of them, not for all."""
    body = message.get("body", b"")
    end = 0
    for end in range(PIECE_BYTES, len(body), PIECE_BYTES):
        piece = body[end - PIECE_BYTES : end]
        yield {"type": "http.response.body", "body": piece, "more_body": True}
    yield {**message, "body": body[end:]} if end else message


async def _lifespan(receive: Receive, send: Send) -> None:
    """Who opens the gateway closes it; a server has nothing to start or stop here."""
    while True:
        message = await receive()
        await send({"type": f"{message['type']}.complete"})
        if message["type"] == "lifespan.shutdown":
            return
