"""What the HTTP layers tell the meters: calls begun and ended, clients gone."""

from collections.abc import Iterable
from typing import NamedTuple, Protocol

from sagellm.gateway.metrics.bounds import ALL_CALLS_S, CALL_S
from sagellm.gateway.metrics.lag import LoopLag
from sagellm.logs import num_dropped_lines
from sagellm.runtime.buckets import Buckets

# What probes and scrapers call: no part of the HTTP metrics that vLLM has too.
NOT_MEASURED = frozenset({"/metrics", "/health", "/load", "/ping", "/version", "/live", "/ready"})
UNKNOWN = "unknown"  # for whatever a client named that is in no table
_LAG_INTERVAL_S = 0.1  # short: calls are refused by what it shows
_METHODS = frozenset({"GET", "POST", "HEAD", "PUT", "DELETE", "OPTIONS", "PATCH"})


class Meters(Protocol):
    """Called on the app's loop. `endpoint` is a path of the route table, never what a client wrote;
    whatever is in no table counts as "unknown".
    """

    def request_started(self, endpoint: str, method: str) -> None:
        """A call came in; exactly one `request_ended` follows."""

    def request_ended(self, endpoint: str, method: str, status: int, seconds: float) -> None:
        """A call is over; `status` 499 where the client went first."""

    def disconnected(self) -> None:
        """A client left before its answer was whole."""

    async def exposition(self, accept: str = "") -> tuple[bytes, str]:
        """The text of /metrics and its content type, as the Accept header wants it."""

    def app_lag_s(self) -> float:
        """How late the app's loop is now."""

    async def watch_app_loop(self) -> None:
        """Measure how late the app's loop is, until cancelled; for a loop that has no session."""


class Call(NamedTuple):
    endpoint: str
    method: str


class HttpMeters:
    """Counts calls by endpoint. Lives on the app's loop, and is read there."""

    def __init__(self, endpoints: Iterable[str]) -> None:
        self._endpoints = frozenset(endpoints)
        self.num_active = 0
        self.num_disconnects = 0
        self.requests: dict[Call, int] = {}
        self.responses: dict[tuple[Call, int], int] = {}
        self.seconds: dict[Call, Buckets] = {}
        self.all_seconds = Buckets(ALL_CALLS_S)  # of the calls that vLLM measures
        self.app_lag = LoopLag(_LAG_INTERVAL_S)

    @property
    def num_dropped_lines(self) -> int:
        """Of the log, by this process."""
        return num_dropped_lines()

    def app_lag_s(self) -> float:
        return self.app_lag.now_s()

    async def watch_app_loop(self) -> None:
        await self.app_lag.run()

    def request_started(self, endpoint: str, method: str) -> None:
        call = self._call(endpoint, method)
        self.num_active += 1
        self.requests[call] = self.requests.get(call, 0) + 1

    def request_ended(self, endpoint: str, method: str, status: int, seconds: float) -> None:
        call = self._call(endpoint, method)
        key = call, status if 100 <= status < 600 else 0
        self.num_active -= 1
        self.responses[key] = self.responses.get(key, 0) + 1
        if call not in self.seconds:
            self.seconds[call] = Buckets(CALL_S)
        self.seconds[call].observe(seconds)
        if call.endpoint not in NOT_MEASURED:
            self.all_seconds.observe(seconds)

    def disconnected(self) -> None:
        self.num_disconnects += 1

    def _call(self, endpoint: str, method: str) -> Call:
        return Call(self._known(endpoint), method if method in _METHODS else UNKNOWN)

    def _known(self, endpoint: str) -> str:
        return endpoint if endpoint in self._endpoints else UNKNOWN


class NoMeters:
    """Measures nothing."""

    def request_started(self, endpoint: str, method: str) -> None:
        """Nothing."""

    def request_ended(self, endpoint: str, method: str, status: int, seconds: float) -> None:
        """Nothing."""

    def disconnected(self) -> None:
        """Nothing."""

    async def exposition(self, accept: str = "") -> tuple[bytes, str]:
        return b"", "text/plain; version=0.0.4; charset=utf-8"

    def app_lag_s(self) -> float:
        return 0.0

    async def watch_app_loop(self) -> None:
        """Nothing."""
