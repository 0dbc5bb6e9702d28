"""The ASGI application, and the refusal of calls that never reach it."""

import math
import re
from collections.abc import Iterable, Iterator
from contextlib import nullcontext, suppress
from dataclasses import replace
from socket import MSG_PEEK, SHUT_WR, socket

import anyio
from starlette.requests import Request
from starlette.types import Message, Receive, Scope, Send

from sagellm.gateway.api_errors import (
    NUM_TURNS,
    draining,
    failure_of,
    headers_of,
    note_error,
    response_of,
    shed,
)
from sagellm.gateway.gateway import Gateway, objective_of
from sagellm.gateway.http.call import (
    CLIENT_LEFT,
    Call,
    EndpointRoute,
    OpenCalls,
    RouteTable,
    call_fields,
    echo,
    new_call,
    read_request_id,
)
from sagellm.gateway.http.checks import (
    ApiKeys,
    Hosts,
    OpenBodies,
    RequestBody,
    check_body,
    check_headers,
)
from sagellm.gateway.http.routes import routes_of
from sagellm.graphs.log import get_logger

LOG = get_logger("sagellm.gateway")
PIECE_BYTES = 64 << 10


def build_app(gateway: Gateway) -> "App":
    """Return the app of one open graph, with all routes that its settings allow."""
    return App(gateway, routes_of(gateway.settings))


class App:
    """Answers HTTP and refuses WebSockets. Every call passes the same checks, in the same order.

    A drain waits for `calls`. `generating` maps the bytes of a path that generates to the path.
    """

    def __init__(self, gateway: Gateway, routes: Iterable[EndpointRoute]) -> None:
        self.gateway = gateway
        self.table = RouteTable(routes)
        self.calls = OpenCalls(gateway.num_calls)
        self.bodies = OpenBodies(gateway.settings.limits)
        self._hosts = Hosts(gateway.settings)
        self._keys = ApiKeys(gateway.settings)
        self.objective_s = objective_of(gateway.graph)
        self.generating = {
            route.path.encode(): route.path
            for route in self.table.routes
            if route.generates and route.method == "POST"
        }

    @property
    def lag_s(self) -> float:
        """How late the event loop is."""
        return self.gateway.meters.app_lag_s()

    @property
    def is_too_late(self) -> bool:
        """Whether a call that begins now would miss the objective through the loop alone."""
        return self.objective_s is not None and NUM_TURNS * self.lag_s > self.objective_s

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
        body = RequestBody(scope, receive, limits, call.started_s, self.bodies)
        sending = _Sending(send, call, body)
        scope["state"] = {"call": call, "calls": self.calls, "body": body}
        self.gateway.meters.request_started(route.path, scope["method"])
        try:
            with nullcontext() if route.while_draining else self.calls.open():
                await self._answer(route, scope, body, sending)
        finally:
            self._ended(route, scope, sending)

    async def _answer(
        self, route: EndpointRoute, scope: Scope, body: RequestBody, sending: "_Sending"
    ) -> None:
        """Answer a call. A response that fails after its start is cut off: it never looks whole."""
        try:
            self._check(route, scope)
            request = Request(scope, body.receive, sending.send)
            response = await route.endpoint(self.gateway, request)
            await response(scope, body.receive, sending.send)
        except Exception as error:
            refusal = failure_of(error, sending.call.request_id)
            body.drop()  # before the answer: discarding the rest of the body may take long
            if refusal is not None and not sending.status:
                note_error(scope, refusal)
                await response_of(refusal)(scope, body.receive, sending.send)
        finally:
            body.drop()

    def _check(self, route: EndpointRoute, scope: Scope) -> None:
        """Check everything that needs no body. Raises ApiError."""
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
        """Raise ApiError where the event loop is too late to serve a call."""
        if self.is_too_late:
            raise shed(self.lag_s, should_retry=self.gateway.budgets.may_retry(tenant))

    def _ended(self, route: EndpointRoute, scope: Scope, sending: "_Sending") -> None:
        call, method, status = scope["state"]["call"], scope["method"], sending.end_status
        now = anyio.current_time()
        self.gateway.meters.request_ended(route.path, method, status, now - call.started_s)
        LOG.info("call_ended", **call_fields(call, scope, status, now), route=route.path)


class _Sending:
    """Wraps `send` for one call. `status` is 0 until the response has begun."""

    def __init__(self, send: Send, call: Call, body: RequestBody) -> None:
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
        self._is_whole = True  # before the send: servers end a call during its last send
        await self._send_last(last)

    async def _send_last(self, message: Message) -> None:
        """Send the end of the response, shielded from cancellation, while the rest of the body is
        read.

        During this send Hypercorn prepares its connection for the next call, and reports the client
        as gone: cancellation would leave the connection half prepared, and open for ever. Servers
        send the end of a response only while the rest of the body is read.
        """
        with anyio.CancelScope(shield=True):  # bounded: servers cut off clients that do not read
            if self._body.is_whole:
                await self._send(message)
                return
            async with anyio.create_task_group() as reading:
                reading.start_soon(self._body.discard)
                await self._send(message)
                reading.cancel_scope.cancel()


def _parts(message: Message) -> Iterator[Message]:
    """Yield a large body in pieces: servers bound the time of each send."""
    body = message.get("body", b"")
    end = 0
    for end in range(PIECE_BYTES, len(body), PIECE_BYTES):
        piece = body[end - PIECE_BYTES : end]
        yield {"type": "http.response.body", "body": piece, "more_body": True}
    yield {**message, "body": body[end:]} if end else message


async def _lifespan(receive: Receive, send: Send) -> None:
    """Confirm all lifespan events. The opener of the gateway also closes it."""
    while True:
        message = await receive()
        await send({"type": f"{message['type']}.complete"})
        if message["type"] == "lifespan.shutdown":
            return


_MOST_BYTES = 64 << 10  # the largest call that may be refused unread
_WAIT = 1 / 10  # the part of the objective that connections may wait to be accepted
_STRAINED = 1 / 40  # the part of the objective after which a turn accepts one connection
_LENGTH = re.compile(rb"\r\ncontent-length:[ \t]*(\d{1,6})[ \t]*(?=\r\n)", re.IGNORECASE)
_ID = re.compile(rb"\r\nx-request-id:[ \t]*([^\r\n]*?)[ \t]*(?=\r\n)", re.IGNORECASE)


class Overflow:
    """Notes since when connections wait to be accepted, and refuses calls that wait too long.

    `is_bounded`: the graph has an objective. Without an objective no call is refused here.
    """

    def __init__(self, app: App) -> None:
        self._app = app
        self._waiting_since_s: float | None = None
        self._over_s = -math.inf  # the last time that calls were refused

    @property
    def is_bounded(self) -> bool:
        return self._app.objective_s is not None

    def is_strained(self, now: float) -> bool:
        """Whether more connections come than are accepted, or came less than one objective ago.
        Each accepted call then delays others.
        """
        objective_s = self._app.objective_s or math.inf
        return now - self._over_s < objective_s or self._waited_s(now) > _STRAINED * objective_s

    def none_waits(self) -> None:
        """Note that no connection waits."""
        self._waiting_since_s = None

    def is_over(self, now: float) -> bool:
        """Whether the connections that still wait have waited too long."""
        objective_s = self._app.objective_s
        if objective_s is None:
            return False
        if self._waiting_since_s is None:
            self._waiting_since_s = now
        is_over = self._waited_s(now) > _WAIT * objective_s or self._app.is_too_late
        if is_over:
            self._over_s = now
        return is_over

    def _waited_s(self, now: float) -> float:
        """Return how long connections have waited without a break."""
        return 0.0 if self._waiting_since_s is None else now - self._waiting_since_s

    def refuse(self, sock: socket) -> bool:
        """Answer the call of a new connection with a 503, and close the connection.

        Return False, without reading, unless the whole of a short call that generates has come.
        """
        try:
            sent = sock.recv(_MOST_BYTES, MSG_PEEK)
        except OSError:  # no bytes have come yet
            return False
        path = self._path_of(sent)
        if path is None:
            return False
        with suppress(OSError):  # the client may have left
            sock.recv(_MOST_BYTES)  # the kernel drops the answer if unread bytes are left
            sock.send(self._answer(sent))
            sock.shutdown(SHUT_WR)
        sock.close()
        meters = self._app.gateway.meters
        meters.request_started(path, "POST")
        meters.request_ended(path, "POST", 503, 0.0)
        return True

    def _path_of(self, sent: bytes) -> str | None:
        """Return the path of a whole call that generates; None for any other bytes."""
        head, end, body = sent.partition(b"\r\n\r\n")
        line = head.partition(b"\r\n")[0].split(b" ")
        length = _LENGTH.search(head + b"\r\n")
        if not end or length is None or int(length[1]) != len(body) or len(line) != 3:
            return None
        method, target, version = line
        if method != b"POST" or version != b"HTTP/1.1":
            return None
        return self._app.generating.get(target.partition(b"?")[0])

    def _answer(self, sent: bytes) -> bytes:
        error = shed(self._app.lag_s, should_retry=False)
        given = _ID.search(sent.partition(b"\r\n\r\n")[0] + b"\r\n")
        request_id = read_request_id([(b"x-request-id", given[1])] if given else [])
        lines = (
            "HTTP/1.1 503 Service Unavailable",
            "content-type: application/json",
            f"content-length: {len(error.encoded)}",
            *(f"{name}: {value}" for name, value in headers_of(error).items()),
            f"x-request-id: {request_id}",
            "openai-processing-ms: 0",
            "connection: close",
        )
        return "\r\n".join((*lines, "", "")).encode() + error.encoded
