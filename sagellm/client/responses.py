"""Reads the responses of a server: errors as `ClientError`, streams as server-sent events."""

import ssl
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import anyio
import httpx2
import msgspec

UNREACHABLE = "unreachable"  # no server listens at the address
TIMED_OUT = "timed_out"  # the server sent nothing for too long
CUT_OFF = "cut_off"  # the answer ended too early
BAD_ANSWER = "bad_answer"  # the answer does not follow the OpenAI API
NOT_OFFERED = "not_offered"  # the server, or this client, has no such function
TRANSPORT = (httpx2.RequestError, httpx2.InvalidURL)  # the errors of httpx2
MISUSED = "misused"  # a call from the wrong place or in the wrong form
CLOSED = "the client is closed; create another one"
_QUOTED_CHARS = 200


class ClientError(Exception):
    """The error of a failed call.

    `status`: the HTTP status; None without one (an unreachable server, an error inside a stream).
    `code`: the server's error code, or a code of this module, such as UNREACHABLE. `retry_after_s`:
    seconds that the server asks the client to wait. `should_retry`: the server's advice whether to
    try again, if any.
    """

    def __init__(
        self,
        message: str,
        *,
        status: int | None = None,
        code: str | None = None,
        type: str | None = None,
        param: str | None = None,
        retry_after_s: float | None = None,
        should_retry: bool | None = None,
        request_id: str | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.status = status
        self.code = code
        self.type = type
        self.param = param
        self.retry_after_s = retry_after_s
        self.should_retry = should_retry
        self.request_id = request_id


def response_error(status: int, headers: Mapping[str, str], body: bytes) -> ClientError:
    """The error of a response whose status is not 2xx."""
    fields = _error_fields(body)
    return ClientError(
        _text(fields.get("message")) or _status_message(status, body),
        status=status,
        code=_text(fields.get("code")),
        type=_text(fields.get("type")),
        param=_text(fields.get("param")),
        retry_after_s=_seconds(headers.get("retry-after")),
        should_retry={"true": True, "false": False}.get(headers.get("x-should-retry", "")),
        request_id=headers.get("x-request-id"),
    )


def stream_error(data: bytes | str) -> ClientError:
    """The error that a stream contains instead of a chunk."""
    raw = data.encode() if isinstance(data, str) else data
    fields = _error_fields(raw)
    code = fields.get("code")
    # Some servers, such as vLLM, put the HTTP status into `code`.
    is_status = isinstance(code, int) and 400 <= code < 600
    return ClientError(
        _text(fields.get("message")) or f"the stream ended with an error: {_quoted(raw)}",
        status=code if is_status else None,
        code=_text(code),
        type=_text(fields.get("type")),
        param=_text(fields.get("param")),
    )


def _first_message(error: BaseException) -> str:
    """The first message that is not empty, of an error and its causes.

    Some TLS errors have their message only in an inner cause.
    """
    while not str(error) and (cause := error.__cause__ or error.__context__) is not None:
        error = cause
    text = str(error) or type(error).__name__
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"{text}; SSL_CERT_FILE names the file of an authority of your own"
    return text


@contextmanager
def raising_client_errors(url: str) -> Iterator[None]:
    """Turn errors of httpx2 in the block into ClientError."""
    try:
        yield
    except TRANSPORT as error:
        raise transport_error(error, url) from error


def transport_error(error: Exception, url: str) -> ClientError:
    """The ClientError for an error of httpx2, one of TRANSPORT."""
    match error:
        case httpx2.ConnectError() | httpx2.ConnectTimeout():
            text = f"no server answers at {url}: {_first_message(error)}"
            return ClientError(text, code=UNREACHABLE)
        case httpx2.TimeoutException():
            return ClientError(f"{url} sent nothing for too long", code=TIMED_OUT)
        case httpx2.InvalidURL() | httpx2.UnsupportedProtocol():
            return ClientError(f"{url} is not the URL of a server: {error}", code=NOT_OFFERED)
    cause = f"the connection to {url} broke: {str(error) or type(error).__name__}"
    return ClientError(cause, code=CUT_OFF)


def _error_fields(body: bytes) -> dict[str, Any]:
    """The fields of an error body `{"error": {...}}`. Empty if there are none.

    Servers also send `{"error": TEXT}`, `{"detail": ...}`, and the fields without `error`.
    """
    try:
        found = msgspec.json.decode(body)
    except ValueError:
        return {}
    if not isinstance(found, dict):
        return {}
    inner = found.get("error", found)
    if isinstance(inner, str):
        return {"message": inner}
    if not isinstance(inner, dict):
        return {}
    return inner if "message" in inner else {**inner, "message": inner.get("detail")}


def _status_message(status: int, body: bytes) -> str:
    quoted = _quoted(body)
    return f"the server answered {status}" + (f": {quoted}" if quoted else "")


def _quoted(body: bytes) -> str:
    """The first characters of a body, on one line."""
    return " ".join(body[:_QUOTED_CHARS].decode(errors="replace").split())


def _text(value: object) -> str | None:
    return None if value is None else str(value)


def _seconds(value: str | None) -> float | None:
    """The seconds of a Retry-After header. None for a date, the header's other form."""
    try:
        seconds = float(value or "")
    except ValueError:
        return None
    return seconds if 0 <= seconds < float("inf") else None


LARGEST_EVENT = 16 << 20  # bytes
_BOM = b"\xef\xbb\xbf"


class EventTooLong(ValueError):
    """An event that exceeds the size limit."""


@dataclass(frozen=True, slots=True)
class ServerSentEvent:
    """One event. `data`: its data lines, joined by line feeds."""

    data: bytes
    name: str = "message"


class EventReader:
    """Parses a body, in pieces of any size, into server-sent events (HTML standard, 9.2.6).

    Comments, ids and retry times are skipped. Only LF, CR and CRLF end a line: `str.splitlines`
    would also cut text at U+2028 or U+0085. httpx2.EventSource is no replacement: it reads only a
    Response, and takes three times as long for an event.
    """

    def __init__(self, largest: int = LARGEST_EVENT) -> None:
        self._largest = largest
        self._rest = b""  # the beginning of an unfinished line
        self._is_first = True
        self._ended_with_cr = False
        self._data: list[bytes] = []
        self._name = ""
        self._size = 0

    def feed(self, chunk: bytes) -> list[ServerSentEvent]:
        """Parse the next bytes, and return the events that they complete. Raises EventTooLong."""
        lines = (self._rest + self._without_cr(chunk)).split(b"\n")
        if self._is_first:
            if len(lines) == 1 and _BOM.startswith(lines[0]):
                self._rest = lines[0]  # may be a part of the byte order mark
                return []
            lines[0] = lines[0].removeprefix(_BOM)
            self._is_first = False
        self._rest = lines.pop()
        events = [event for line in lines if (event := self._line(line)) is not None]
        if self._size + len(self._rest) > self._largest:
            raise EventTooLong(f"an event of more than {self._largest} bytes")
        return events

    def _without_cr(self, chunk: bytes) -> bytes:
        """The chunk with every CR and CRLF replaced by LF. A CRLF may span two chunks."""
        if self._ended_with_cr and chunk:
            chunk = chunk.removeprefix(b"\n")
            self._ended_with_cr = False
        if b"\r" not in chunk:
            return chunk
        self._ended_with_cr = chunk.endswith(b"\r")
        return chunk.replace(b"\r\n", b"\n").replace(b"\r", b"\n")

    def _line(self, line: bytes) -> ServerSentEvent | None:
        """Parse one line. An empty line ends an event, which is returned."""
        if not line:
            return self._dispatch()
        self._size += len(line)
        field, _, value = line.partition(b":")
        value = value[1:] if value[:1] == b" " else value
        if field == b"data":
            self._data.append(value)
        elif field == b"event":
            self._name = value.decode(errors="replace")
        return None

    def _dispatch(self) -> ServerSentEvent | None:
        data, name = self._data, self._name
        self._data, self._name, self._size = [], "", 0
        return ServerSentEvent(b"\n".join(data), name or "message") if data else None


LINGER_S = 1.0  # longest wait for the end of a response after its last chunk


class BodyBytes:
    """The bytes of a streamed response: call `next` until the last event, then `finish`.

    `aclose` closes the connection, unless the whole response was read.
    """

    def __init__(self, response: httpx2.Response, url: str) -> None:
        self._response = response
        self._chunks = response.aiter_bytes()
        self._url = url

    async def next(self) -> bytes | None:
        """The next bytes; None at the end. Raises ClientError."""
        try:  # a context manager would cost time for every event
            return await anext(self._chunks, None)
        except TRANSPORT as error:
            raise transport_error(error, self._url) from error

    async def finish(self) -> None:
        """Read the rest of the response, so that another call can reuse the connection."""
        with anyio.move_on_after(LINGER_S), suppress(httpx2.HTTPError):
            async for _ in self._chunks:
                pass

    async def aclose(self) -> None:
        """Close the connection, then read on to end every generator inside httpx2.

        Otherwise httpx2 leaves a generator to the garbage collector, and trio warns about it.
        """
        await self._response.aclose()
        with suppress(httpx2.HTTPError, httpx2.StreamError):
            async for _ in self._chunks:
                pass

    async def __aenter__(self) -> "BodyBytes":
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()
