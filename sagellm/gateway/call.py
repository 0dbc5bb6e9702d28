"""What is known of one HTTP call, and how many are open."""

import re
import secrets
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from sagellm.gateway.count import Count

Headers = Iterable[tuple[bytes, bytes]]

_REQUEST_ID = re.compile(rb"[A-Za-z0-9._-]{1,128}")
_TRACEPARENT = re.compile(rb"[0-9a-f]{2}-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}")


@dataclass(frozen=True, slots=True)
class Call:
    """The facts of one call, in `request.state.call`. `started_s` is of the loop's own clock.

    `tenant` is the name of the key that was given; "" before it was checked.
    """

    request_id: str
    tenant: str = ""
    is_admin: bool = False
    started_s: float = 0.0
    traceparent: str = ""


def read_request_id(headers: Headers) -> str:
    """The caller's id where it is one plain word, else a new one."""
    given = _only(headers, b"x-request-id", _REQUEST_ID)
    return given or secrets.token_hex(16)


def read_traceparent(headers: Headers) -> str:
    """The W3C trace context, or "" where it is none."""
    return _only(headers, b"traceparent", _TRACEPARENT)


def _only(headers: Headers, name: bytes, form: re.Pattern[bytes]) -> str:
    """The one value of a header, if it has the form."""
    values = [value for key, value in headers if key == name]
    return values[0].decode() if len(values) == 1 and form.fullmatch(values[0]) else ""


class OpenCalls:
    """The calls under way that a drain waits for. All methods are called on the app's loop.

    `everywhere` counts those of all gateways before one graph.
    """

    def __init__(self, everywhere: Count) -> None:
        self.num_open = 0
        self.everywhere = everywhere
        self._waiting: list[Callable[[], None]] = []

    @contextmanager
    def open(self) -> Iterator[None]:
        self.num_open += 1
        self.everywhere.add(1)
        try:
            yield
        finally:
            self.num_open -= 1
            self.everywhere.add(-1)
            if not self.num_open:
                self._tell()

    def when_idle(self, tell: Callable[[], None]) -> None:
        """Call `tell` once, as soon as no call is open: now, if none is."""
        self._waiting.append(tell)
        if not self.num_open:
            self._tell()

    def _tell(self) -> None:
        waiting, self._waiting = self._waiting, []
        for tell in waiting:
            tell()
