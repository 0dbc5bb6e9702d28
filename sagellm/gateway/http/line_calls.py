"""Requests of batches, answered by the endpoints that answer calls over HTTP."""

from contextlib import AbstractContextManager
from typing import Any, Protocol

import anyio
import msgspec
from starlette.requests import Request
from starlette.types import Message

from sagellm.gateway.api_errors import failure_of
from sagellm.gateway.batches.batch_runner import BatchRunner
from sagellm.gateway.batches.batch_work import LineReply
from sagellm.gateway.gateway import Gateway
from sagellm.gateway.http.call import Call, OpenCalls, RouteTable
from sagellm.gateway.http.checks import tenants

# The paths that a batch may name. A server has those among them that are in its table of routes.
BATCHED = ("/v1/chat/completions", "/v1/completions", "/v1/responses")


class CallCounter(Protocol):
    """The app, as requests of batches need it."""

    table: RouteTable
    calls: OpenCalls

    @property
    def is_too_late(self) -> bool: ...


def batch_runner(gateway: Gateway, app: CallCounter) -> BatchRunner | None:
    """Return the runner of the batches in the data folder; None without such a folder."""
    if gateway.stores is None:
        return None
    meters, names = gateway.meters.batches, tenants(gateway.settings)
    runner = BatchRunner(gateway.stores, AppRequests(gateway, app), meters, names)
    gateway.stores.on_batch = runner.wake
    return runner


class _CodeOf(msgspec.Struct, frozen=True):
    code: str | None = None


class _ErrorBody(msgspec.Struct, frozen=True):
    error: _CodeOf = _CodeOf()


class AppRequests:
    """Answers the requests of batches. See `RequestServer`."""

    def __init__(self, gateway: Gateway, app: CallCounter) -> None:
        self._gateway = gateway
        self._app = app
        self._endpoints = {
            route.path: route.endpoint
            for route in app.table.routes
            if route.path in BATCHED and route.method == "POST"
        }

    @property
    def is_draining(self) -> bool:
        return self._gateway.is_draining

    @property
    def is_too_late(self) -> bool:
        return self._app.is_too_late

    @property
    def max_body_bytes(self) -> int:
        return self._gateway.settings.limits.body_bytes

    def open_call(self) -> AbstractContextManager[None]:
        return self._app.calls.open()

    async def answer(self, endpoint: str, body: bytes, tenant: str, request_id: str) -> LineReply:
        """Return what a client would have got. An exception becomes the error that it is there."""
        call = Call(
            request_id=request_id,
            tenant=tenant,
            started_s=anyio.current_time(),
            is_background=True,
        )
        exchange = _Exchange(body)
        scope = _scope(endpoint, call, self._app.calls)
        try:
            request = Request(scope, exchange.receive, exchange.send)
            response = await self._endpoints[endpoint](self._gateway, request)
            await response(scope, exchange.receive, exchange.send)
        except Exception as error:
            refusal = failure_of(error, request_id)
            assert refusal is not None  # this client never leaves
            retry_after_s = refusal.retry_after_s
            return LineReply(refusal.status, refusal.encoded, refusal.code, retry_after_s)
        return exchange.reply


def _scope(endpoint: str, call: Call, calls: OpenCalls) -> dict[str, Any]:
    """Return the ASGI scope of a call without a connection."""
    return {
        "type": "http",
        "http_version": "1.1",
        "method": "POST",
        "scheme": "http",
        "path": endpoint,
        "raw_path": endpoint.encode(),
        "query_string": b"",
        "headers": [(b"content-type", b"application/json")],
        "path_params": {},
        "state": {"call": call, "calls": calls},
    }


class _Exchange:
    """The client's side of one call: it sends a body, keeps the response, and never leaves."""

    def __init__(self, body: bytes) -> None:
        self._body = body
        self._is_sent = False
        self._status = 0
        self._parts: list[bytes] = []

    async def receive(self) -> Message:
        if not self._is_sent:
            self._is_sent = True
            return {"type": "http.request", "body": self._body, "more_body": False}
        await anyio.sleep_forever()
        raise AssertionError  # not reached

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._status = message["status"]
        else:
            self._parts.append(message.get("body", b""))

    @property
    def reply(self) -> LineReply:
        body = b"".join(self._parts)
        code = (
            None if self._status == 200 else msgspec.json.decode(body, type=_ErrorBody).error.code
        )
        return LineReply(self._status, body, code)
