"""The link between the graph's process and a gateway process: its messages and its framing.

Each frame is a length of 4 bytes (little-endian) and a message in MessagePack.
"""

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
    """The first message to a gateway.

    `graph` is the graph in MessagePack. `log_level` is a level of `logging`, and `log_format` a
    format of `sagellm.logs`.
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
    """The end of a stream with an error. The fields are those of an ApiError."""

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
    """The answer to the query with this number.

    `is_known`: the cancelled request was known, or the metrics could be read. `content` and
    `content_type` are those of the metrics.
    """

    number: int
    is_known: bool = False
    content: bytes = b""
    content_type: str = ""


class ReportCounters(_LinkMessage, frozen=True, tag=True):
    """A command: send a `CounterReport` with this number, at once."""

    number: int


class StartDrain(_LinkMessage, frozen=True, tag=True):
    """A command: refuse new calls, and send `Drained` after the last open call."""


class Retire(_LinkMessage, frozen=True, tag=True):
    """A command: accept no more connections, finish the open calls, and exit."""


class Shutdown(_LinkMessage, frozen=True, tag=True):
    """A command: close idle connections, and exit."""


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
    """A new request. `stream`: a number that the gateway chose for the stream of the request."""

    stream: int
    request: Request
    timing: Timing


class TokensRead(_LinkMessage, frozen=True, tag=True):
    """A report of tokens that a client has read since the previous report."""

    stream: int
    num_tokens: int


class Abandon(_LinkMessage, frozen=True, tag=True):
    """The reader of a stream has left."""

    stream: int


class CancelRequest(_LinkMessage, frozen=True, tag=True):
    """A query: cancel a request of this gateway, and answer whether it was known."""

    number: int
    request_id: str


class CancelCall(_LinkMessage, frozen=True, tag=True):
    """A query: cancel the requests of a call of any gateway, and answer whether it was known."""

    number: int
    call_id: str


class Scrape(_LinkMessage, frozen=True, tag=True):
    """A query: answer the metrics of the graph and of all gateways. `accept`: an Accept header."""

    number: int
    accept: str


class BucketCounts(_LinkMessage, frozen=True, tag=True):
    """The samples of a `Buckets`. Both processes know its bounds."""

    counts: list[int]
    total: float

    @classmethod
    def of(cls, buckets: Buckets) -> "BucketCounts":
        return cls(buckets.counts, buckets.total)

    def add_to(self, buckets: Buckets) -> None:
        buckets.counts = [a + b for a, b in zip(buckets.counts, self.counts, strict=True)]
        buckets.total += self.total


class CounterReport(_LinkMessage, frozen=True, tag=True):
    """The counts of a gateway since its start. The report also shows that the process lives."""

    number: int  # the number of the `ReportCounters`; 0 if not requested
    num_active: int
    num_disconnects: int
    num_dropped_lines: int
    requests: list[tuple[str, str, int]]  # endpoint, method
    responses: list[tuple[str, str, int, int]]  # endpoint, method, status
    seconds: list[tuple[str, str, BucketCounts]]  # endpoint, method
    all_seconds: BucketCounts
    app_lag: BucketCounts
    num_working_batches: int
    batches: dict[str, int]  # status -> batches that ended
    batch_requests: dict[str, int]  # by outcome


class Drained(_LinkMessage, frozen=True, tag=True):
    """The gateway has no more open calls, after a `StartDrain`."""


class RetireRequested(_LinkMessage, frozen=True, tag=True):
    """The gateway received SIGTERM or SIGQUIT, and requests a `Retire`."""


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
    """Convert a value of a type that msgspec cannot encode."""
    if isinstance(value, Path):
        return str(value)
    raise NotImplementedError(type(value).__name__)


def dec_hook(kind: type, value: Any) -> Any:
    """Convert a value back to a type that msgspec cannot decode."""
    if kind is Path:
        return Path(value)
    raise NotImplementedError(kind.__name__)


LOG = get_logger("sagellm.gateway")

T = TypeVar("T")

_HEAD_BYTES = 4
_MOST_BYTES = 256 << 20  # the largest valid message, far above the limits of bodies
_READ_BYTES = 1 << 18


class MessageLink(Generic[T]):
    """One end of a link over a socket pair. `receives`: the union of the incoming message types.

    Messages that are put within one turn of the loop are sent together. The queue has no bound of
    its own, because the windows of streams and the budgets of tenants bound its content.
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
        """Queue a message. Do nothing if the link is broken."""
        if not self.is_broken:
            body = self._encoder.encode(message)
            self._waiting += len(body).to_bytes(_HEAD_BYTES, "little")
            self._waiting += body
            self._has_waiting.set()

    async def send(self) -> None:
        """Send queued messages until cancelled, or until the other process has ended."""
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
        """Wait until `send` has sent all queued messages, or the link is broken."""
        # Polled: this is called once, at the end of a process, so `send` needs no event for it.
        while (self._waiting or self._is_sending) and not self.is_broken:  # noqa: ASYNC110
            await anyio.sleep(0.001)

    async def messages(self) -> AsyncGenerator[T]:
        """Yield incoming messages until the other process ends or sends an invalid message."""
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
    """Read the first message of a link. The call blocks the thread.

    Raises OSError if the link is broken.
    """
    size = int.from_bytes(_exactly(sock, _HEAD_BYTES), "little")
    return msgspec.msgpack.decode(_exactly(sock, size), type=kind, dec_hook=dec_hook)


def _exactly(sock: socket, size: int) -> bytes:
    """Read `size` bytes. The call blocks the thread. Raises ConnectionError at the end."""
    read = bytearray()
    while len(read) < size:
        part = sock.recv(size - len(read))
        if not part:
            raise ConnectionError("the graph's process is gone")
        read += part
    return bytes(read)


def _frames(unread: bytearray) -> list[bytes]:
    """Remove all complete frames from `unread`, and return their bodies.

    Raises ValueError for a frame that is too long.
    """
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
