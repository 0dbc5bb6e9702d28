"""The body of a request: bounded in size and time while it comes, and read to its end."""

from math import inf

import anyio
from starlette.types import Message, Receive, Scope

from sagellm.gateway.errors import ApiError
from sagellm.gateway.settings import Limits

RETRY_S = 1.0


class Bodies:
    """The bytes that the bodies of all open calls have, which are bounded together: each is held
    as text and as tokens until its call ends.
    """

    def __init__(self, limits: Limits) -> None:
        self._limit = limits.all_bodies_bytes
        self.num_bytes = 0

    def check(self, num_bytes: float, own_bytes: int = 0) -> None:
        """Raises ApiError 503 where so many more are too many. A body that is larger than the bound
        is read alone; `own_bytes` are those of the same body.
        """
        if self.num_bytes + num_bytes > self._limit and self.num_bytes > own_bytes:
            message = "the server holds too many large requests; try again"
            raise ApiError(503, message, code="too_many_bodies", retry_after_s=RETRY_S)


class Body:
    """Wraps `receive`. `is_whole`: nothing of the body is on its way any more. `read_s`: when its
    last part was read, on the loop's clock; None before. How long a client takes to send it is the
    client's time.
    """

    def __init__(
        self, scope: Scope, receive: Receive, limits: Limits, started_s: float, bodies: Bodies
    ) -> None:
        self._receive = receive
        self._limits = limits
        self._bodies = bodies
        self._deadline_s = started_s + limits.body_s
        self._num_bytes = 0
        self.is_whole = not _has_body(scope)
        self.read_s: float | None = None

    async def receive(self) -> Message:
        """Raises ApiError 413 as soon as the body is too large, 408 where it takes too long, 503
        where too much is in hand with the bodies of others.
        """
        if self.is_whole:
            return await self._receive()
        with anyio.CancelScope(deadline=self._deadline_s) as late:
            return self._counted(await self._receive())
        assert late.cancelled_caught
        raise ApiError(408, f"the body took longer than {self._limits.body_s:g} s")

    def _counted(self, message: Message) -> Message:
        num_bytes = len(message.get("body", b""))
        self.is_whole = not message.get("more_body", False)
        if self.is_whole:
            self.read_s = anyio.current_time()
        if self._num_bytes + num_bytes > self._limits.body_bytes:
            raise too_large(self._limits)
        self._bodies.check(num_bytes, self._num_bytes)
        self._num_bytes += num_bytes
        self._bodies.num_bytes += num_bytes
        return message

    def drop(self) -> None:
        """Nobody holds the body any more. May be called more than once."""
        self._bodies.num_bytes -= self._num_bytes
        self._num_bytes = 0

    async def discard(self) -> None:
        """Read what nobody wants until the body ends, the client leaves, or the time is over.

        Without it a server that waits for its app to read could not end the call.
        """
        with anyio.CancelScope(deadline=self._deadline_s):
            more = not self.is_whole
            while more:
                more = (await self._receive()).get("more_body", False)
            self.is_whole = True


def check_body(scope: Scope, limits: Limits, bodies: Bodies) -> None:
    """Raises ApiError for what the headers say of the body: 413 too large, 415 compressed, 503 too
    large beside those in hand.
    """
    for name, value in scope["headers"]:
        if name == b"content-encoding" and value.strip().lower() not in (b"", b"identity"):
            raise ApiError(415, "compressed bodies are not taken", param="content-encoding")
        if name == b"content-length":
            if _length(value) > limits.body_bytes:
                raise too_large(limits)
            bodies.check(_length(value))


def too_large(limits: Limits) -> ApiError:
    return ApiError(413, f"the body is larger than {limits.body_bytes} bytes")


def _length(value: bytes) -> float:
    """More digits than any length has are not worth converting."""
    digits = value.lstrip(b"0")
    return inf if len(digits) > 18 else int(digits or b"0")


def _has_body(scope: Scope) -> bool:
    """HTTP/2 needs no header to send one."""
    named = any(name in (b"content-length", b"transfer-encoding") for name, _ in scope["headers"])
    return named or scope["http_version"] == "2"
