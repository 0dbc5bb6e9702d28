"""The errors of HTTP calls: one exception class, its JSON, and the errors of a busy server."""

import math
import secrets
from collections.abc import MutableMapping
from typing import Any

import msgspec
from starlette.requests import ClientDisconnect
from starlette.responses import Response

from sagellm.graphs.log import get_logger

_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    405: "invalid_request_error",
    408: "timeout_error",
    409: "invalid_request_error",
    413: "invalid_request_error",
    415: "invalid_request_error",
    421: "invalid_request_error",
    429: "rate_limit_error",
    431: "invalid_request_error",
    503: "service_unavailable",
    504: "timeout_error",
}


class ApiError(Exception):
    """The error that ends a call.

    The client sees `message`, so it must not contain a path, a prompt or the text of another
    exception. `retry_after_s` and `should_retry` become headers.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after_s: float | None = None,
        should_retry: bool | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code
        self.retry_after_s = retry_after_s
        self.should_retry = should_retry

    @property
    def type(self) -> str:
        return _TYPES.get(self.status, "server_error")

    @property
    def body(self) -> dict[str, Any]:
        """The error object of the OpenAI API: {"error": {"message", "type", "param", "code"}}."""
        error = {
            "message": self.message,
            "type": self.type,
            "param": self.param,
            "code": self.code,
        }
        return {"error": error}

    @property
    def encoded(self) -> bytes:
        return msgspec.json.encode(self.body)


def note_error(scope: MutableMapping[str, Any], error: ApiError) -> None:
    """Store the error of a call in its scope, for the log line of the call."""
    scope["state"]["error"] = error.code or error.type


def wrong(param: str, message: str, code: str | None = None) -> ApiError:
    """Return a 400 error. `param` is the wrong field of the request."""
    return ApiError(400, f"{param}: {message}", param=param, code=code)


LOG = get_logger("sagellm.gateway")


def response_of(error: ApiError, body: bytes) -> Response:
    """Return the HTTP response with an error's status and headers, and a JSON text."""
    return Response(body, error.status, headers_of(error), "application/json")


def headers_of(error: ApiError) -> dict[str, str]:
    """Return the headers of an error's response, without the content type."""
    headers = {}
    if error.retry_after_s is not None:  # the header takes whole seconds; 0 would ask for a storm
        headers["retry-after"] = str(max(1, math.ceil(error.retry_after_s)))
    if error.should_retry is not None:
        headers["x-should-retry"] = "true" if error.should_retry else "false"
    if error.status == 401:
        headers["www-authenticate"] = "Bearer"
    return headers


def failure_of(error: Exception, request_id: str) -> ApiError | None:
    """Return the error to answer for an exception; None if the client has left.

    An ApiError is returned unchanged. Any other exception is logged with its traceback, and becomes
    a 500 that shows the client only the request id.
    """
    error = _only(error)
    if isinstance(error, ApiError):
        return error
    if isinstance(error, ClientDisconnect):
        return None
    LOG.error("call_failed", request_id=request_id, exc_info=error)
    return ApiError(500, f"internal error; the operator finds it under request {request_id}")


def _only(error: Exception) -> Exception:
    """Unwrap exception groups that hold a single exception."""
    while isinstance(error, ExceptionGroup) and len(error.exceptions) == 1:
        error = error.exceptions[0]
    return error


RETRY_AFTER_S = 5.0  # by then, load balancers have removed a draining gateway


def draining() -> ApiError:
    """Return the 503 for new calls during a drain."""
    return ApiError(
        503,
        "the server is shutting down",
        code="shutting_down",
        retry_after_s=RETRY_AFTER_S,
        should_retry=True,
    )


# A call takes this many turns of the event loop to be read, encoded, admitted and answered. Each
# turn may be late by the measured lag.
NUM_TURNS = 10


def shed(lag_s: float, *, should_retry: bool) -> ApiError:
    """Return the 503 for a call that the late event loop cannot serve in time."""
    return ApiError(
        503,
        "the server has too much to do; try again later",
        code="slo_unreachable",
        retry_after_s=max(1.0, NUM_TURNS * lag_s),
        should_retry=should_retry,
    )


_HTTP_FAULTS = {
    400: "the request is not valid HTTP/1.1",
    408: "the request took too long to come",
    431: "the headers are too large",
    503: "there are too many connections",
}


def refusal(status: int) -> tuple[list[tuple[bytes, bytes]], bytes]:
    """Return the headers and the body that answer bytes which are no valid HTTP request.

    The server must close the connection after the answer.
    """
    body = ApiError(status, _HTTP_FAULTS.get(status, _HTTP_FAULTS[400])).encoded
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", b"%d" % len(body)),
        (b"x-request-id", secrets.token_hex(16).encode()),
        (b"connection", b"close"),
    ]
    return headers, body
