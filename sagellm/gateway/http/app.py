"""The ASGI application, and the early refusal of calls that the server has no time to serve."""

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
from sagellm.gateway.http.dialects import ApiDialect
from sagellm.gateway.http.line_calls import batch_runner
from sagellm.gateway.http.routes import routes_of
from sagellm.gateway.settings import RequestLimits
from sagellm.graphs.log import get_logger

LOG = get_logger("sagellm.gateway")
PIECE_BYTES = 64 << 10


def build_app(gateway: Gateway) -> "App":
    """Return the app of a gateway, with the routes that the gateway's settings allow."""
    return App(gateway, routes_of(gateway.settings))


class App:
    """The ASGI app. It answers HTTP and refuses WebSockets. All calls pass the same checks.

    `calls`: the open calls, for which a drain waits. `generating`: the routes that generate, by the
    bytes of their paths.
    """

    def __init__(self, gateway: Gateway, routes: Iterable[EndpointRoute]) -> None:
        self.gateway = gateway
        self.table = RouteTable(routes)
        self.calls = OpenCalls(gateway.num_calls)
        self.bodies = OpenBodies(gateway.settings.limits)
        self._upload_limits = gateway.settings.upload_limits
        self._uploads = OpenBodies(self._upload_limits)
        self._hosts = Hosts(gateway.settings)
        self._keys = ApiKeys(gateway.settings)
        self.objective_s = objective_of(gateway.graph)
        self.generating = {
            route.path.encode(): route
            for route in self.table.routes
            if route.generates and route.method == "POST"
        }
        self._batches = batch_runner(gateway, self)

    async def run_background(self) -> None:
        """Measure the lag of the app's loop and work on batches, until cancelled, on that loop."""
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(self.gateway.meters.watch_app_loop)
            if self._batches is not None:
                tasks.start_soon(self._batches.run)

    def body_s(self, path: bytes) -> float:
        """Return the longest time of a body. `path`: the path of its call."""
        routes = self.table.routes
        is_upload = any(route.uploads and route.path.encode() == path for route in routes)
        return (self._upload_limits if is_upload else self.gateway.settings.limits).body_s

    def _bounds(self, route: EndpointRoute) -> tuple[RequestLimits, OpenBodies]:
        """Return the limits of a route's bodies, and the total that counts them."""
        if route.uploads:
            return self._upload_limits, self._uploads
        return self.gateway.settings.limits, self.bodies

    @property
    def lag_s(self) -> float:
        """The lag of the app's event loop, in seconds."""
        return self.gateway.meters.app_lag_s()

    @property
    def is_too_late(self) -> bool:
        """Whether the lag of the loop alone would make a new call miss the TTFT objective."""
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
        limits, bodies = self._bounds(route)
        body = RequestBody(scope, receive, limits, call.started_s, bodies)
        sending = _Sending(send, call, body, route.dialect)
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
        """Check and answer a call. An exception before the response starts becomes an error answer.

        After the start, an exception cuts the response off, so that it does not look complete.
        """
        try:
            self._check(route, scope)
            request = Request(scope, body.receive, sending.send)
            response = await route.endpoint(self.gateway, request)
            await response(scope, body.receive, sending.send)
        except Exception as error:
            refusal = failure_of(error, sending.call.request_id)
            body.drop()  # free its memory before the answer, whose sending may take long
            if refusal is not None and not sending.status:
                note_error(scope, refusal)
                content = route.dialect.error_body(refusal, sending.call.request_id)
                await response_of(refusal, content)(scope, body.receive, sending.send)
        finally:
            body.drop()

    def _check(self, route: EndpointRoute, scope: Scope) -> None:
        """Make all checks that need no body. Raises ApiError."""
        settings = self.gateway.settings
        check_headers(scope, settings.limits)
        self._hosts.check(scope)
        caller = self._keys.caller(scope, route.access, route.dialect.key_header)
        state = scope["state"]
        state["call"] = replace(state["call"], tenant=caller.tenant, is_admin=caller.is_admin)
        if self.gateway.is_draining and not route.while_draining:
            raise draining()
        if route.generates:
            self._shed(caller.tenant)
        check_body(scope, *self._bounds(route))

    def _shed(self, tenant: str) -> None:
        """Raise ApiError 503 if the event loop is too late to serve the call."""
        if self.is_too_late:
            raise shed(self.lag_s, should_retry=self.gateway.budgets.may_retry(tenant))

    def _ended(self, route: EndpointRoute, scope: Scope, sending: "_Sending") -> None:
        """Measure and log the end of a call."""
        call, method, status = scope["state"]["call"], scope["method"], sending.end_status
        now = anyio.current_time()
        self.gateway.meters.request_ended(route.path, method, status, now - call.started_s)
        log = LOG.debug if status in route.quiet_on else LOG.info
        log("call_ended", **call_fields(call, scope, status, now), route=route.path)


class _Sending:
    """Wraps `send` for one call: adds headers and tracks whether the whole response was sent.

    `status` is 0 until the response has started.
    """

    def __init__(self, send: Send, call: Call, body: RequestBody, dialect: ApiDialect) -> None:
        self._send = send
        self._body = body
        self._dialect = dialect
        self._is_whole = False
        self.call = call
        self.status = 0

    @property
    def end_status(self) -> int:
        return self.status if self._is_whole else CLIENT_LEFT

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            message["headers"] = [*message.get("headers", ()), *echo(self.call, self._dialect)]
            await self._send(message)
            return
        *parts, last = _parts(message)
        for part in parts:
            await self._send(part)
        if last.get("more_body", False):
            await self._send(last)
            return
        self._is_whole = True  # set first: during its last send, a server may cancel the call
        await self._send_last(last)

    async def _send_last(self, message: Message) -> None:
        """Send the last part of the response, and meanwhile discard the unread request body.

        Servers wait with the last part until the request body has been read. The send is shielded
        from cancellation: meanwhile Hypercorn resets its connection for the next call and reports
        a disconnect, and a cancellation would leave the connection open for ever.
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
    """Split a large body into pieces, because servers limit the time of each send."""
    body = message.get("body", b"")
    end = 0
    for end in range(PIECE_BYTES, len(body), PIECE_BYTES):
        piece = body[end - PIECE_BYTES : end]
        yield {"type": "http.response.body", "body": piece, "more_body": True}
    yield {**message, "body": body[end:]} if end else message


async def _lifespan(receive: Receive, send: Send) -> None:
    """Confirm all lifespan events, without effect."""
    # The code that opens a gateway also closes it, so there is nothing to start or stop here.
    while True:
        message = await receive()
        await send({"type": f"{message['type']}.complete"})
        if message["type"] == "lifespan.shutdown":
            return


_MOST_BYTES = 64 << 10  # the largest call that is refused before the app reads it
_WAIT = 1 / 10  # share of the TTFT objective that connections may wait to be accepted
_STRAINED = 1 / 40  # share of the objective after which a turn accepts only one connection
_LENGTH = re.compile(rb"\r\ncontent-length:[ \t]*(\d{1,6})[ \t]*(?=\r\n)", re.IGNORECASE)
_ID = re.compile(rb"\r\nx-request-id:[ \t]*([^\r\n]*?)[ \t]*(?=\r\n)", re.IGNORECASE)


class Overflow:
    """Measures how long connections wait to be accepted, and refuses calls that wait too long.

    Without a TTFT objective of the graph, no call is refused here.
    """

    def __init__(self, app: App) -> None:
        self._app = app
        self._waiting_since_s: float | None = None
        self._over_s = -math.inf  # when `is_over` was last true

    @property
    def is_bounded(self) -> bool:
        """Whether the graph has a TTFT objective."""
        return self._app.objective_s is not None

    def is_strained(self, now: float) -> bool:
        """Whether connections queue up, or were refused during the last `objective_s` seconds.

        The server should then accept connections one by one: each accepted call delays others.
        """
        objective_s = self._app.objective_s or math.inf
        return now - self._over_s < objective_s or self._waited_s(now) > _STRAINED * objective_s

    def none_waits(self) -> None:
        """Record that no connection waits to be accepted."""
        self._waiting_since_s = None

    def is_over(self, now: float) -> bool:
        """Record that connections wait. Return whether they must be refused."""
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
        """Return for how long there has always been a waiting connection, in seconds."""
        return 0.0 if self._waiting_since_s is None else now - self._waiting_since_s

    def refuse(self, sock: socket) -> bool:
        """Answer the call on a new connection with a 503, and close the connection.

        Return False, and leave the socket unread, unless a complete short call of a generating
        route has arrived: the server must then serve the connection.
        """
        try:
            sent = sock.recv(_MOST_BYTES, MSG_PEEK)
        except OSError:  # no bytes have come yet
            return False
        route = self._route_of(sent)
        if route is None:
            return False
        with suppress(OSError):  # the client may have left
            sock.recv(_MOST_BYTES)  # the kernel drops the answer if unread bytes are left
            sock.send(self._answer(sent, route.dialect))
            sock.shutdown(SHUT_WR)
        sock.close()
        meters = self._app.gateway.meters
        meters.request_started(route.path, "POST")
        meters.request_ended(route.path, "POST", 503, 0.0)
        return True

    def _route_of(self, sent: bytes) -> EndpointRoute | None:
        """Return the generating route of a complete call; None for any other bytes."""
        head, end, body = sent.partition(b"\r\n\r\n")
        line = head.partition(b"\r\n")[0].split(b" ")
        length = _LENGTH.search(head + b"\r\n")
        if not end or length is None or int(length[1]) != len(body) or len(line) != 3:
            return None
        method, target, version = line
        if method != b"POST" or version != b"HTTP/1.1":
            return None
        return self._app.generating.get(target.partition(b"?")[0])

    def _answer(self, sent: bytes, dialect: ApiDialect) -> bytes:
        """Return a whole HTTP response with a 503. `sent`: the bytes of the call.

        The response repeats the call's x-request-id.
        """
        error = shed(self._app.lag_s, should_retry=False)
        given = _ID.search(sent.partition(b"\r\n\r\n")[0] + b"\r\n")
        request_id = read_request_id([(b"x-request-id", given[1])] if given else [])
        body = dialect.error_body(error, request_id)
        lines = (
            "HTTP/1.1 503 Service Unavailable",
            "content-type: application/json",
            f"content-length: {len(body)}",
            *(f"{name}: {value}" for name, value in headers_of(error).items()),
            f"x-request-id: {request_id}",
            *(f"{name.decode()}: {request_id}" for name in dialect.id_headers),
            "openai-processing-ms: 0",
            "connection: close",
        )
        return "\r\n".join((*lines, "", "")).encode() + body
