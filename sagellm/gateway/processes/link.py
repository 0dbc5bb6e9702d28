"""The link between the process of a graph and a gateway process: messages, frames."""

from collections.abc import AsyncGenerator
from pathlib import Path
from socket import socket
from typing import Any, Generic, TypeAlias, TypeVar

import anyio
import msgspec
from anyio.abc import ByteStream

from sagellm.gateway.api_errors import ApiError
from sagellm.gateway.protocol.sampling_params import ModelCard
from sagellm.gateway.settings import Settings
from sagellm.graphs.log import get_logger
from sagellm.runtime.containers import Buckets
from sagellm.runtime.messages import Request, TokenEvent
from sagellm.session.requests import Timing


class _LinkMessage(msgspec.Struct, frozen=True, array_like=True, tag=True):
    pass


# ---- messages of the graph's process --------------------------------------------------------


class GatewaySetup(_LinkMessage, frozen=True, tag=True):
    """The first message to a gateway. `graph` is MessagePack; `log_level` is a level of `logging`,
    and `log_format` a format of `sagellm.logs`.
    """

    settings: Settings
    models: tuple[ModelCard, ...]
    graph: bytes
    log_level: int
    is_ready: bool
    not_ready_reason: str
    is_draining: bool
    log_format: str | None = None


class StreamEvents(_LinkMessage, frozen=True, tag=True):
    """New events of a stream. `is_end`: these are the last events."""

    stream: int
    events: list[TokenEvent]
    is_end: bool = False


class StreamRefused(_LinkMessage, frozen=True, tag=True):
    """The end of a stream by an error, with the fields of an ApiError."""

    stream: int
    status: int
    message: str
    param: str | None = None
    code: str | None = None
    retry_after_s: float | None = None
    should_retry: bool | None = None

    @classmethod
    def of(cls, stream: int, error: ApiError) -> "StreamRefused":
        return cls(stream, *(getattr(error, name) for name in cls.__struct_fields__[1:]))

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


class ReadinessChanged(_LinkMessage, frozen=True, tag=True):
    """Whether the graph produces tokens, and the reason if it does not."""

    is_ready: bool
    reason: str


class QueryAnswer(_LinkMessage, frozen=True, tag=True):
    """The answer to the query of that number: whether a request was known, or the metrics."""

    number: int
    is_known: bool = False
    content: bytes = b""
    content_type: str = ""


class ReportCounters(_LinkMessage, frozen=True, tag=True):
    """Asks for a `CounterReport` with this number, at once."""

    number: int


class StartDrain(_LinkMessage, frozen=True, tag=True):
    """Refuse new calls; send `Drained` after the last open call."""


class Retire(_LinkMessage, frozen=True, tag=True):
    """Accept no more connections, finish the open calls, and exit: another process takes over."""


class Shutdown(_LinkMessage, frozen=True, tag=True):
    """Close idle connections, and exit."""


ToGatewayMessage: TypeAlias = (
    GatewaySetup
    | StreamEvents
    | StreamRefused
    | ReadinessChanged
    | QueryAnswer
    | ReportCounters
    | StartDrain
    | Retire
    | Shutdown
)


# ---- messages of a gateway ------------------------------------------------------------------


class Started(_LinkMessage, frozen=True, tag=True):
    """The gateway accepts connections."""


class SubmitRequest(_LinkMessage, frozen=True, tag=True):
    """A new request, under a stream number of the gateway."""

    stream: int
    request: Request
    timing: Timing


class TokensRead(_LinkMessage, frozen=True, tag=True):
    """The number of tokens that were read since the last report."""

    stream: int
    num_tokens: int


class Abandon(_LinkMessage, frozen=True, tag=True):
    """The reader of a stream has left."""

    stream: int


class CancelRequest(_LinkMessage, frozen=True, tag=True):
    """A query: end a request of this gateway."""

    number: int
    request_id: str


class CancelCall(_LinkMessage, frozen=True, tag=True):
    """A query: end the requests of a call of any gateway."""

    number: int
    call_id: str


class Scrape(_LinkMessage, frozen=True, tag=True):
    """A query: the metrics of the graph and of all gateways, for an Accept header."""

    number: int
    accept: str


class BucketCounts(_LinkMessage, frozen=True, tag=True):
    """The samples of `Buckets`; both sides know the bounds."""

    counts: list[int]
    total: float

    @classmethod
    def of(cls, buckets: Buckets) -> "BucketCounts":
        return cls(buckets.counts, buckets.total)

    def add_to(self, buckets: Buckets) -> None:
        buckets.counts = [a + b for a, b in zip(buckets.counts, self.counts, strict=True)]
        buckets.total += self.total


class CounterReport(_LinkMessage, frozen=True, tag=True):
    """The counts of a gateway since its start. The report is also a sign of life."""

    number: int  # the number of the `ReportCounters`; 0 without one
    num_active: int
    num_disconnects: int
    num_dropped_lines: int
    requests: list[tuple[str, str, int]]  # endpoint, method
    responses: list[tuple[str, str, int, int]]  # endpoint, method, status
    seconds: list[tuple[str, str, BucketCounts]]  # endpoint, method
    all_seconds: BucketCounts
    app_lag: BucketCounts


class Drained(_LinkMessage, frozen=True, tag=True):
    """The gateway has no open calls after `StartDrain`."""


class RetireRequested(_LinkMessage, frozen=True, tag=True):
    """The gateway got SIGTERM, and asks for `Retire`."""


GatewayMessage: TypeAlias = (
    Started
    | SubmitRequest
    | TokensRead
    | Abandon
    | CancelRequest
    | CancelCall
    | Scrape
    | CounterReport
    | Drained
    | RetireRequested
)


def enc_hook(value: Any) -> Any:
    """Encode a type that msgspec does not know."""
    if isinstance(value, Path):
        return str(value)
    raise NotImplementedError(type(value).__name__)


def dec_hook(kind: type, value: Any) -> Any:
    if kind is Path:
        return Path(value)
    raise NotImplementedError(kind.__name__)


LOG = get_logger("sagellm.gateway")

T = TypeVar("T")

_HEAD_BYTES = 4
_MOST_BYTES = 256 << 20  # the largest message; far above the limits of bodies
_READ_BYTES = 1 << 18


class MessageLink(Generic[T]):
    """One end of a link over a socket pair. `receives` is the union of incoming messages, type T.

    Messages that are put in one turn of the loop are sent together. The queue has no bound of its
    own: the windows of streams and the budgets of calls bound it.
    """

    def __init__(self, stream: ByteStream, receives: Any) -> None:
        self._stream = stream
        self._encoder = msgspec.msgpack.Encoder(enc_hook=enc_hook)
        self._decoder: msgspec.msgpack.Decoder[T] = msgspec.msgpack.Decoder(
            receives, dec_hook=dec_hook
        )
        self._waiting = bytearray()
        self._has_waiting = anyio.Event()
        self._is_sending = False
        self.is_broken = False

    def put(self, message: msgspec.Struct) -> None:
        """Send a message soon. Without effect on a broken link."""
        if not self.is_broken:
            body = self._encoder.encode(message)
            self._waiting += len(body).to_bytes(_HEAD_BYTES, "little")
            self._waiting += body
            self._has_waiting.set()

    async def send(self) -> None:
        """Send messages until cancelled, or until the other process is gone."""
        try:
            while True:
                await self._has_waiting.wait()
                self._has_waiting = anyio.Event()
                leaving, self._waiting = self._waiting, bytearray()
                self._is_sending = True
                await self._stream.send(bytes(leaving))
                self._is_sending = False
        except (anyio.BrokenResourceError, anyio.ClosedResourceError):
            self.is_broken = True
            self._waiting.clear()

    async def flush(self) -> None:
        """Wait until `send` has sent all messages."""
        while (self._waiting or self._is_sending) and not self.is_broken:  # noqa: ASYNC110
            await anyio.sleep(0.001)

    async def messages(self) -> AsyncGenerator[T]:
        """Yield messages until the other process is gone, or until a message is invalid."""
        unread = bytearray()
        try:
            while True:
                unread += await self._stream.receive(_READ_BYTES)
                for body in _frames(unread):
                    yield self._decoder.decode(body)
        except (anyio.EndOfStream, anyio.BrokenResourceError, anyio.ClosedResourceError):
            pass
        except (msgspec.DecodeError, ValueError) as error:
            LOG.error("link_garbled", error=type(error).__name__)
        finally:
            self.is_broken = True


def read_first(sock: socket, kind: type[T]) -> T:
    """Read the first message, before any loop runs. Raises OSError for a broken link."""
    size = int.from_bytes(_exactly(sock, _HEAD_BYTES), "little")
    return msgspec.msgpack.decode(_exactly(sock, size), type=kind, dec_hook=dec_hook)


def _exactly(sock: socket, size: int) -> bytes:
    read = bytearray()
    while len(read) < size:
        part = sock.recv(size - len(read))
        if not part:
            raise ConnectionError("the graph's process is gone")
        read += part
    return bytes(read)


def _frames(unread: bytearray) -> list[bytes]:
    """Remove all whole frames from `unread`, and return their bodies. Raises ValueError."""
    found, start = [], 0
    while len(unread) - start >= _HEAD_BYTES:
        size = int.from_bytes(unread[start : start + _HEAD_BYTES], "little")
        if size > _MOST_BYTES:
            raise ValueError("a message that is too long")
        end = start + _HEAD_BYTES + size
        if len(unread) < end:
            break
        found.append(bytes(unread[start + _HEAD_BYTES : end]))
        start = end
    del unread[:start]
    return found
