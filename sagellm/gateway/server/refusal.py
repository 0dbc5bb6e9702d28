"""The answer to bytes that are no HTTP request, or take too long to become one."""

from sagellm.gateway.call import read_request_id
from sagellm.gateway.failure import ApiError

_MESSAGES = {
    400: "the request is not valid HTTP/1.1",
    408: "the request took too long to come",
    431: "the headers are too large",
    503: "there are too many connections",
}


def refusal(status: int) -> tuple[list[tuple[bytes, bytes]], bytes]:
    """Headers and body; the connection is closed behind them."""
    body = ApiError(status, _MESSAGES.get(status, _MESSAGES[400])).encoded
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", b"%d" % len(body)),
        (b"x-request-id", read_request_id(()).encode()),
        (b"connection", b"close"),
    ]
    return headers, body
