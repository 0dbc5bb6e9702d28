"""What went wrong with a call: one exception, whatever the server or the network did."""

import ssl
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import httpx2
import msgspec

UNREACHABLE = "unreachable"  # nobody listens there
TIMED_OUT = "timed_out"  # no sign of the server for too long
CUT_OFF = "cut_off"  # the answer ended before it was whole
BAD_ANSWER = "bad_answer"  # the answer is not what the OpenAI API says
NOT_OFFERED = "not_offered"  # the server, or this client, cannot do that
TRANSPORT = (httpx2.RequestError, httpx2.InvalidURL)  # what httpx2 raises
MISUSED = "misused"  # a call in a place or form that cannot work
CLOSED = "the client is closed; create another one"
_QUOTED_CHARS = 200


class ClientError(Exception):
    """A call that was not answered.

    `status` is that of HTTP, or None where there was none (a server that cannot be reached, an
    error inside a stream). `code` is the server's, or one of this module's. `retry_after_s` is
    when the server says that another attempt makes sense, `should_retry` whether it says that one
    does at all.
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


def refused(status: int, headers: Mapping[str, str], body: bytes) -> ClientError:
    """The error that an answer other than 2xx holds."""
    said = _said(body)
    return ClientError(
        _text(said.get("message")) or _unsaid(status, body),
        status=status,
        code=_text(said.get("code")),
        type=_text(said.get("type")),
        param=_text(said.get("param")),
        retry_after_s=_seconds(headers.get("retry-after")),
        should_retry={"true": True, "false": False}.get(headers.get("x-should-retry", "")),
        request_id=headers.get("x-request-id"),
    )


def broken(data: bytes | str) -> ClientError:
    """The error that a stream holds in place of a chunk."""
    raw = data.encode() if isinstance(data, str) else data
    said = _said(raw)
    code = said.get("code")
    is_status = isinstance(code, int) and 400 <= code < 600
    return ClientError(
        _text(said.get("message")) or f"the stream ended with an error: {_quoted(raw)}",
        status=code if is_status else None,
        code=_text(code),
        type=_text(said.get("type")),
        param=_text(said.get("param")),
    )


def _reason(error: BaseException) -> str:
    """The first text among an error and its causes: under TLS the outer ones have none."""
    while not str(error) and (cause := error.__cause__ or error.__context__) is not None:
        error = cause
    text = str(error) or type(error).__name__
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"{text}; SSL_CERT_FILE names the file of an authority of your own"
    return text


@contextmanager
def translated(url: str) -> Iterator[None]:
    """Raise ClientError for what the transport raises."""
    try:
        yield
    except TRANSPORT as error:
        raise translation(error, url) from error


def translation(error: Exception, url: str) -> ClientError:
    """What one of TRANSPORT means."""
    match error:
        case httpx2.ConnectError() | httpx2.ConnectTimeout():
            text = f"no server answers at {url}: {_reason(error)}"
            return ClientError(text, code=UNREACHABLE)
        case httpx2.TimeoutException():
            return ClientError(f"{url} sent nothing for too long", code=TIMED_OUT)
        case httpx2.InvalidURL() | httpx2.UnsupportedProtocol():
            return ClientError(f"{url} is not the URL of a server: {error}", code=NOT_OFFERED)
    cause = f"the connection to {url} broke: {str(error) or type(error).__name__}"
    return ClientError(cause, code=CUT_OFF)


def _said(body: bytes) -> dict[str, Any]:
    """{"error": {...}} of the OpenAI API, and its likes: a text, or `detail`, or no envelope."""
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


def _unsaid(status: int, body: bytes) -> str:
    quoted = _quoted(body)
    return f"the server answered {status}" + (f": {quoted}" if quoted else "")


def _quoted(body: bytes) -> str:
    """The beginning of what the server sent, on one line."""
    return " ".join(body[:_QUOTED_CHARS].decode(errors="replace").split())


def _text(value: object) -> str | None:
    return None if value is None else str(value)


def _seconds(value: str | None) -> float | None:
    """Retry-After in seconds; its date form is not used by servers of this kind."""
    try:
        seconds = float(value or "")
    except ValueError:
        return None
    return seconds if 0 <= seconds < float("inf") else None
