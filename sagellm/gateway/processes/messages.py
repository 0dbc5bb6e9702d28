"""What the process of a graph and those of its gateways say to each other."""

from pathlib import Path
from typing import Any, TypeAlias

import msgspec

from sagellm.gateway.cards import ModelCard
from sagellm.gateway.door import Entry
from sagellm.gateway.errors import ApiError
from sagellm.gateway.settings import Settings
from sagellm.runtime.buckets import Buckets
from sagellm.runtime.messages import TokenEvent


class _Message(msgspec.Struct, frozen=True, array_like=True, tag=True):
    pass


# ---- from the graph -------------------------------------------------------------------------


class Setup(_Message, frozen=True, tag=True):
    """The first that a gateway hears. `graph` is encoded; `log_level` is that of `logging`, and
    `log_format` that of `sagellm.logs`.
    """

    settings: Settings
    models: tuple[ModelCard, ...]
    graph: bytes
    log_level: int
    is_ready: bool
    not_ready_reason: str
    is_draining: bool
    log_format: str | None = None


class Events(_Message, frozen=True, tag=True):
    """What came for a stream; `is_end`: nothing comes after."""

    stream: int
    events: list[TokenEvent]
    is_end: bool = False


class Refused(_Message, frozen=True, tag=True):
    """The end of a stream, with the fields of an ApiError."""

    stream: int
    status: int
    message: str
    param: str | None = None
    code: str | None = None
    retry_after_s: float | None = None
    should_retry: bool | None = None

    @property
    def error(self) -> ApiError:
        return ApiError(
            self.status,
            self.message,
            param=self.param,
            code=self.code,
            retry_after_s=self.retry_after_s,
            should_retry=self.should_retry,
        )


class Readied(_Message, frozen=True, tag=True):
    """The graph produces tokens, or why it does not."""

    is_ready: bool
    reason: str


class Answered(_Message, frozen=True, tag=True):
    """To a question of that number: whether a request was known, or the metrics, if there are."""

    number: int
    is_known: bool = False
    content: bytes = b""
    content_type: str = ""


class Ask(_Message, frozen=True, tag=True):
    """Say `Counted` with this number at once."""

    number: int


class Drain(_Message, frozen=True, tag=True):
    """Take nothing new; say `Idle` once nothing is under way."""


class Retire(_Message, frozen=True, tag=True):
    """Take no more connections, finish what is under way, and end: another takes its place."""


class Stop(_Message, frozen=True, tag=True):
    """Close the connections that have nothing more to say, and end."""


FromGraph: TypeAlias = Setup | Events | Refused | Readied | Answered | Ask | Drain | Retire | Stop


# ---- from a gateway -------------------------------------------------------------------------


class Up(_Message, frozen=True, tag=True):
    """It takes connections."""


class Enter(_Message, frozen=True, tag=True):
    """A request begins, under a number of the gateway's own."""

    stream: int
    entry: Entry


class Taken(_Message, frozen=True, tag=True):
    """So many more tokens of it were read."""

    stream: int
    num_tokens: int


class Leave(_Message, frozen=True, tag=True):
    """Nobody reads it any more."""

    stream: int


class Cancel(_Message, frozen=True, tag=True):
    """A question: end a request of this gateway."""

    number: int
    request_id: str


class CancelCall(_Message, frozen=True, tag=True):
    """A question: end the requests of a call, whichever gateway has it."""

    number: int
    call_id: str


class Scrape(_Message, frozen=True, tag=True):
    """A question: the metrics of the graph and of all gateways, as the Accept header wants them."""

    number: int
    accept: str


class Histogram(_Message, frozen=True, tag=True):
    """The samples of `Buckets` whose bounds both sides know."""

    counts: list[int]
    total: float

    @classmethod
    def of(cls, buckets: Buckets) -> "Histogram":
        return cls(buckets.counts, buckets.total)

    def add_to(self, buckets: Buckets) -> None:
        buckets.counts = [a + b for a, b in zip(buckets.counts, self.counts, strict=True)]
        buckets.total += self.total


class Counted(_Message, frozen=True, tag=True):
    """What a gateway has counted since it started: a sign of life, too."""

    number: int  # of the question; 0: of none
    num_active: int
    num_disconnects: int
    num_dropped_lines: int
    requests: list[tuple[str, str, int]]  # endpoint, method
    responses: list[tuple[str, str, int, int]]  # endpoint, method, status
    seconds: list[tuple[str, str, Histogram]]  # endpoint, method
    all_seconds: Histogram
    app_lag: Histogram


class Idle(_Message, frozen=True, tag=True):
    """Drained."""


class Leaving(_Message, frozen=True, tag=True):
    """It got SIGTERM, and would like to `Retire`."""


FromGateway: TypeAlias = (
    Up | Enter | Taken | Leave | Cancel | CancelCall | Scrape | Counted | Idle | Leaving
)


def refused(stream: int, error: ApiError) -> Refused:
    return Refused(
        stream,
        error.status,
        error.message,
        error.param,
        error.code,
        error.retry_after_s,
        error.should_retry,
    )


def enc_hook(value: Any) -> Any:
    """For what msgspec does not know."""
    if isinstance(value, Path):
        return str(value)
    raise NotImplementedError(type(value).__name__)


def dec_hook(kind: type, value: Any) -> Any:
    if kind is Path:
        return Path(value)
    raise NotImplementedError(kind.__name__)
