"""Refusals below the app: bytes that are no request, and calls refused where they are accepted."""

import math
import re
from contextlib import suppress
from socket import MSG_PEEK, SHUT_WR, socket

from sagellm.gateway.app import App
from sagellm.gateway.call import read_request_id
from sagellm.gateway.errors import ApiError, headers_of, shed

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


_MOST_BYTES = 64 << 10  # of a call that is refused here
_WAIT = 1 / 10  # of the objective: how long connections may wait to be accepted
_STRAINED = 1 / 40  # of the objective: how long until a turn takes one connection alone
_LENGTH = re.compile(rb"\r\ncontent-length:[ \t]*(\d{1,6})[ \t]*(?=\r\n)", re.IGNORECASE)
_ID = re.compile(rb"\r\nx-request-id:[ \t]*([^\r\n]*?)[ \t]*(?=\r\n)", re.IGNORECASE)


class Overflow:
    """Knows since when connections wait to be accepted, and refuses what came too long ago.

    `is_bounded`: whether the graph has an objective. Without one nothing is refused here.
    """

    def __init__(self, app: App) -> None:
        self._app = app
        self._waiting_since_s: float | None = None
        self._over_s = -math.inf  # when calls were refused last

    @property
    def is_bounded(self) -> bool:
        return self._app.objective_s is not None

    def is_strained(self, now: float) -> bool:
        """Whether more come than are taken, now or less than an objective ago: then each call that
        is taken delays others.
        """
        objective_s = self._app.objective_s or math.inf
        return now - self._over_s < objective_s or self._waited_s(now) > _STRAINED * objective_s

    def none_waits(self) -> None:
        """All connections were accepted."""
        self._waiting_since_s = None

    def is_over(self, now: float) -> bool:
        """Whether those that wait now, after others were accepted, have waited too long."""
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
        """How long there have been some, turn after turn, that were not accepted."""
        return 0.0 if self._waiting_since_s is None else now - self._waiting_since_s

    def refuse(self, sock: socket) -> bool:
        """Answer the call that a connection has brought with a 503, and close the connection.
        False, and nothing was read, unless it is the whole of a short call that generates.
        """
        try:
            sent = sock.recv(_MOST_BYTES, MSG_PEEK)
        except OSError:  # nothing has come yet
            return False
        path = self._path_of(sent)
        if path is None:
            return False
        with suppress(OSError):  # the client has left
            sock.recv(_MOST_BYTES)  # else the kernel drops the answer as the socket is closed
            sock.send(self._answer(sent))
            sock.shutdown(SHUT_WR)
        sock.close()
        meters = self._app.gateway.meters
        meters.request_started(path, "POST")
        meters.request_ended(path, "POST", 503, 0.0)
        return True

    def _path_of(self, sent: bytes) -> str | None:
        """The route of a whole call that generates; None for anything else."""
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
