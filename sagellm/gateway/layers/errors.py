"""What a call that fails is answered: one JSON shape, never the text of an exception."""

import math

from starlette.requests import ClientDisconnect
from starlette.responses import Response

from sagellm.gateway.failure import ApiError
from sagellm.graphs.log import get_logger

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
