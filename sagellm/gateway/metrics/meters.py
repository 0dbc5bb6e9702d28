"""The meters of one gateway process: counters and histograms that are cheap to update."""

import copy
import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from typing import NamedTuple, Protocol

import anyio

from sagellm.logs import num_dropped_lines
from sagellm.runtime.containers import Buckets
from sagellm.runtime.messages import CODES, PRIORITIES

TTFT_S = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75,
    1, 2.5, 5, 7.5, 10, 20, 40, 80, 160, 640, 2560,
)  # fmt: skip
TOKEN_S = (
    0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80,
)  # fmt: skip
REQUEST_S = (
    0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920, 7680,
)  # fmt: skip
CHOICES = (1, 2, 5, 10, 20)
PREEMPTIONS = (1, 2, 3, 4, 5, 10, 20)
# The buckets of prometheus-fastapi-instrumentator: for each handler, and for all calls together.
HANDLER_S = (0.1, 0.5, 1)
ALL_CALLS_S = (
    0.01, 0.025, 0.05, 0.075, 0.1, 0.25, 0.5, 0.75,
    1, 1.5, 2, 2.5, 3, 3.5, 4, 4.5, 5, 7.5, 10, 30, 60,
)  # fmt: skip
# From a millisecond on, as for SGLang's stages: small models have short phases.
PHASE_S = tuple(round(0.001 * 1.62**power, 6) for power in range(30))
LAG_S = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5)
CALL_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)


def lengths(longest: int) -> tuple[int, ...]:
    """Return the histogram bounds 1, 2, 5, 10, 20, 50 ... up to `longest`."""
    bounds = (digit * 10**power for power in range(len(str(longest))) for digit in (1, 2, 5))
    return tuple(bound for bound in bounds if bound <= longest) or (1,)


class Ticking(Protocol):
    def __call__(self) -> None: ...


class LoopLag:
    """Measures the lag of one event loop: the delay after repeated sleeps of `interval_s` seconds.

    `tick` is called after each sleep.
    """

    def __init__(self, interval_s: float = 0.5, tick: Ticking | None = None) -> None:
        self.seconds = Buckets(LAG_S)
        self._interval_s = interval_s
        self._tick = tick
        self._latest_s = 0.0
        self._due_s = math.inf

    def now_s(self) -> float:
        """Return the lag in seconds: that of the last sleep, or of an overdue sleep if longer."""
        return max(self._latest_s, anyio.current_time() - self._due_s)

    async def run(self) -> None:
        """Measure until cancelled."""
        while True:
            self._due_s = anyio.current_time() + self._interval_s
            await anyio.sleep_until(self._due_s)
            self._latest_s = max(anyio.current_time() - self._due_s, 0.0)
            self.seconds.observe(self._latest_s)
            if self._tick is not None:
                self._tick()


CLASSES = {number: name for name, number in PRIORITIES.items()}
OTHER = "other"
PHASES = ("queue", "prefill", "transfer", "decode")


_BOUNDS = {
    "ttft": TTFT_S,
    "itl": TOKEN_S,
    "tpot": TOKEN_S,
    "e2e": REQUEST_S,
    "queue": REQUEST_S,
    "inference": REQUEST_S,
    "prefill": REQUEST_S,
    "decode": REQUEST_S,
    "kv_transfer": PHASE_S,
    "num_choices": CHOICES,
    "num_preemptions": PREEMPTIONS,
}
_LENGTHS = ("prompt_len", "computed_len", "generation_len", "longest_len", "max_tokens")


@dataclass(slots=True)
class Counts:
    """The counts of one model since the start. Each choice counts as a request.

    `lengths`: the bounds of the histograms of token counts. TTFT, ITL and end-to-end times are
    measured at the delivery of items. All other times come from the stamps of events.
    """

    lengths: tuple[int, ...]
    num_accepted: int = 0
    ended: dict[str, int] = field(default_factory=dict)  # finish reason -> requests
    rejected: dict[tuple[str, str], int] = field(default_factory=dict)  # (code, priority class)
    prompt_tokens: int = 0
    cached_tokens: int = 0
    generation_tokens: int = 0
    goodput_tokens: int = 0
    kv_transfer_bytes: int = 0
    kv_transfer_tokens: int = 0
    ttft: Buckets = field(init=False)
    itl: Buckets = field(init=False)
    tpot: Buckets = field(init=False)
    e2e: Buckets = field(init=False)
    queue: Buckets = field(init=False)
    inference: Buckets = field(init=False)
    prefill: Buckets = field(init=False)
    decode: Buckets = field(init=False)
    kv_transfer: Buckets = field(init=False)
    num_choices: Buckets = field(init=False)
    num_preemptions: Buckets = field(init=False)  # of choices that an engine has started
    prompt_len: Buckets = field(init=False)
    computed_len: Buckets = field(init=False)
    generation_len: Buckets = field(init=False)
    longest_len: Buckets = field(init=False)  # length of the longest choice of each request
    max_tokens: Buckets = field(init=False)
    phases: dict[str, Buckets] = field(init=False)

    def __post_init__(self) -> None:
        for name, which in (*_BOUNDS.items(), *((name, self.lengths) for name in _LENGTHS)):
            setattr(self, name, Buckets(which))
        self.phases = {phase: Buckets(PHASE_S) for phase in PHASES}

    @property
    def num_open(self) -> int:
        """The choices that have not ended."""
        return self.num_accepted - sum(self.ended.values())

    def end(self, reason: str) -> None:
        """Count the end of a choice."""
        self.ended[reason] = self.ended.get(reason, 0) + 1

    def reject(self, code: str, priority: int) -> None:
        """Count a refusal."""
        # Unknown codes and priorities share a label: a user's operator may make any number.
        key = code if code in CODES else OTHER, CLASSES.get(priority, OTHER)
        self.rejected[key] = self.rejected.get(key, 0) + 1

    def snapshot(self) -> "Counts":
        """Return a copy that later counts do not change."""
        copied = copy.copy(self)
        for each in fields(self):
            value = getattr(self, each.name)
            if isinstance(value, Buckets | dict):
                setattr(copied, each.name, value.copy())
        copied.phases = {phase: buckets.copy() for phase, buckets in self.phases.items()}
        return copied


# Paths of health checks and scrapers. The HTTP metrics of vLLM leave them out.
NOT_MEASURED = frozenset({"/metrics", "/health", "/load", "/ping", "/version", "/live", "/ready"})
UNKNOWN = "unknown"  # label for unknown names, so that clients cannot create labels
_LAG_INTERVAL_S = 0.1  # short, because calls are refused by this lag
_METHODS = frozenset({"GET", "POST", "HEAD", "PUT", "DELETE", "OPTIONS", "PATCH"})


class BatchMeters:
    """Counts batches and their requests, on the app's loop.

    `num_working`: the batches that this process works on. `batches`: ended batches by status.
    `requests`: requests by outcome: "answered", "failed", or "retried" after a refusal.
    """

    def __init__(self) -> None:
        self.num_working = 0
        self.batches: dict[str, int] = {}
        self.requests: dict[str, int] = {}

    @contextmanager
    def working(self) -> Iterator[None]:
        """Count one batch as worked on during the `with` block."""
        self.num_working += 1
        try:
            yield
        finally:
            self.num_working -= 1

    def ended(self, status: str) -> None:
        self.batches[status] = self.batches.get(status, 0) + 1

    def answered(self, *, is_ok: bool) -> None:
        self._count("answered" if is_ok else "failed")

    def retried(self) -> None:
        self._count("retried")

    def _count(self, outcome: str) -> None:
        self.requests[outcome] = self.requests.get(outcome, 0) + 1


class Meters(Protocol):
    """The meters that the app uses, on its loop.

    `endpoint` is a path of the route table. Other endpoints and unknown methods count as "unknown".
    """

    @property
    def batches(self) -> BatchMeters: ...

    def request_started(self, endpoint: str, method: str) -> None:
        """Count a new call. The caller must call `request_ended` exactly once for it."""

    def request_ended(self, endpoint: str, method: str, status: int, seconds: float) -> None:
        """Count the end of a call. `status` is 499 if the client left before the end."""

    def disconnected(self) -> None:
        """Count a client that left before the end of its answer."""

    async def exposition(self, accept: str = "") -> tuple[bytes, str]:
        """Return the text of /metrics and its content type, for an Accept header."""

    def app_lag_s(self) -> float:
        """Return the lag of the app's loop, in seconds."""

    async def watch_app_loop(self) -> None:
        """Measure the lag of the app's loop until cancelled. Must run on this loop."""


class EndpointCall(NamedTuple):
    endpoint: str
    method: str


class HttpMeters:
    """Counts calls by endpoint and method, on the app's loop."""

    def __init__(self, endpoints: Iterable[str]) -> None:
        self._endpoints = frozenset(endpoints)
        self.num_active = 0
        self.num_disconnects = 0
        self.requests: dict[EndpointCall, int] = {}
        self.responses: dict[tuple[EndpointCall, int], int] = {}
        self.seconds: dict[EndpointCall, Buckets] = {}
        self.all_seconds = Buckets(ALL_CALLS_S)  # all calls, except those of NOT_MEASURED
        self.app_lag = LoopLag(_LAG_INTERVAL_S)
        self.batches = BatchMeters()

    @property
    def num_dropped_lines(self) -> int:
        """The number of log lines that this process has dropped."""
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

    def _call(self, endpoint: str, method: str) -> EndpointCall:
        return EndpointCall(self._known(endpoint), method if method in _METHODS else UNKNOWN)

    def _known(self, endpoint: str) -> str:
        return endpoint if endpoint in self._endpoints else UNKNOWN


class NoMeters:
    """Meters that measure nothing."""

    batches = BatchMeters()

    def request_started(self, endpoint: str, method: str) -> None:
        """Do nothing."""

    def request_ended(self, endpoint: str, method: str, status: int, seconds: float) -> None:
        """Do nothing."""

    def disconnected(self) -> None:
        """Do nothing."""

    async def exposition(self, accept: str = "") -> tuple[bytes, str]:
        return b"", "text/plain; version=0.0.4; charset=utf-8"

    def app_lag_s(self) -> float:
        return 0.0

    async def watch_app_loop(self) -> None:
        """Do nothing."""
