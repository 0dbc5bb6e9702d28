"""Errors of calls: one exception, one JSON shape, and the refusals while draining or overloaded."""

import math
from collections.abc import MutableMapping
from typing import Any

import msgspec
from starlette.requests import ClientDisconnect
from starlette.responses import Response

from sagellm.graphs.ir import Graph
from sagellm.graphs.log import get_logger

_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    405: "invalid_request_error",
    408: "timeout_error",
    413: "invalid_request_error",
    415: "invalid_request_error",
    421: "invalid_request_error",
    429: "rate_limit_error",
    431: "invalid_request_error",
    503: "service_unavailable",
    504: "timeout_error",
}


class ApiError(Exception):
    """Ends a call. `message` is shown to the client: it never holds a path, a prompt or the text
    of another exception. `retry_after_s` and `should_retry` become headers.
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
        """{"error": {"message", "type", "param", "code"}}, as the OpenAI API has it."""
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
    """Remember what the client of a call is told, for the log."""
    scope["state"]["error"] = error.code or error.type


def wrong(param: str, message: str, code: str | None = None) -> ApiError:
    """A 400 that names the field."""
    return ApiError(400, f"{param}: {message}", param=param, code=code)


LOG = get_logger("sagellm.gateway")


def response_of(error: ApiError) -> Response:
    """The answer to a call that was refused."""
    return Response(error.encoded, error.status, headers_of(error), "application/json")


def headers_of(error: ApiError) -> dict[str, str]:
    """What the headers of that answer say of the error."""
    headers = {}
    if error.retry_after_s is not None:
        headers["retry-after"] = str(max(1, math.ceil(error.retry_after_s)))
    if error.should_retry is not None:
        headers["x-should-retry"] = "true" if error.should_retry else "false"
    if error.status == 401:
        headers["www-authenticate"] = "Bearer"
    return headers


def failure_of(error: Exception, request_id: str) -> ApiError | None:
    """What the client is told of an exception: a refusal as it is, the rest by its request id.

    None where the client has left. What is our fault is logged with its traceback.
    """
    error = _only(error)
    if isinstance(error, ApiError):
        return error
    if isinstance(error, ClientDisconnect):
        return None
    LOG.error("call_failed", request_id=request_id, exc_info=error)
    return ApiError(500, f"internal error; the operator finds it under request {request_id}")


def _only(error: Exception) -> Exception:
    """The exception inside groups of one."""
    while isinstance(error, ExceptionGroup) and len(error.exceptions) == 1:
        error = error.exceptions[0]
    return error


RETRY_AFTER_S = 5.0  # by then a load balancer has taken this gateway out


def draining() -> ApiError:
    return ApiError(
        503,
        "the server is shutting down",
        code="shutting_down",
        retry_after_s=RETRY_AFTER_S,
        should_retry=True,
    )


# A call takes turns of the loop to be read, encoded, admitted and answered, each as late as the
# last: so many of them.
_NUM_TURNS = 10


def objective_of(graph: Graph | None) -> float | None:
    """The longest time to a first token that the operator has set for all requests.

    None where requests may come in over an `admission` that has no objective: which one a call
    meets is not known before it is read.
    """
    nodes = graph.nodes if graph is not None else ()
    found = [node.attrs.get("slo_ttft_s") for node in nodes if node.op == "admission"]
    known = [float(each) for each in found if isinstance(each, int | float)]
    return max(known) if known and len(known) == len(found) else None


def is_too_late(lag_s: float, objective_s: float | None) -> bool:
    """Whether a call that begins now would miss the objective through the loop alone."""
    return objective_s is not None and _NUM_TURNS * lag_s > objective_s


def shed(lag_s: float, *, should_retry: bool) -> ApiError:
    """The error that the client is told."""
    return ApiError(
        503,
        "the server has too much to do; try again later",
        code="slo_unreachable",
        retry_after_s=max(1.0, _NUM_TURNS * lag_s),
        should_retry=should_retry,
    )
