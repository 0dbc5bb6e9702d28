"""One HTTP call: its id, its facts, and the log line that it ends with."""

import re
import secrets
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import anyio
from starlette.types import Scope

from sagellm.gateway.answers.reply import Tally
from sagellm.gateway.budgets import Count
from sagellm.gateway.routing import shown

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


def new_call(scope: Scope) -> Call:
    """A call whose caller is not known yet; its id is fit for headers and logs."""
    headers = scope["headers"]
    return Call(
        request_id=read_request_id(headers),
        started_s=anyio.current_time(),
        traceparent=read_traceparent(headers),
    )


def echo(call: Call) -> list[tuple[bytes, bytes]]:
    """The headers that every answer has."""
    processing_ms = round((anyio.current_time() - call.started_s) * 1000)
    return [
        (b"x-request-id", call.request_id.encode()),
        (b"openai-processing-ms", b"%d" % processing_ms),
    ]


_METHOD_LEN = 16
_SHORTEST_S = 1e-3  # of which a rate says anything


def call_fields(call: Call, scope: Scope, status: int, now: float) -> dict[str, object]:
    """The fields of its log line: `error` where its client was told of one, and of tokens where any
    were counted. `now` is on the loop's clock.
    """
    fields: dict[str, object] = {
        "request_id": call.request_id,
        "tenant": call.tenant,
        "method": scope["method"][:_METHOD_LEN],
        "path": path_of(scope),
        "status": status,
        "client": client_of(scope),
        "seconds": round(now - call.started_s, 6),
    }
    error: str | None = scope["state"].get("error")
    if error is not None:  # a stream that fails after its first event has status 200
        fields["error"] = error
    tally: Tally | None = scope["state"].get("tally")
    return fields if tally is None else fields | dict(_tokens(call, tally, now))


def path_of(scope: Scope) -> str:
    """As answers show it, without its query, which may hold a key."""
    raw: bytes = scope.get("raw_path") or b""
    return shown(raw.partition(b"?")[0])


def client_of(scope: Scope) -> str:
    """The address that the connection is from: a proxy's where there is one."""
    client = scope.get("client")
    return str(client[0]) if client else ""


def _tokens(call: Call, tally: Tally, now: float) -> Iterator[tuple[str, object]]:
    """Tokens a second count from the first token on, those of all choices together."""
    usage = tally.usage
    if tally.first_s is None or not usage.completion_tokens:
        return
    yield "num_prompt_tokens", usage.prompt_tokens
    yield "num_output_tokens", usage.completion_tokens
    yield "ttft_s", round(tally.first_s - call.started_s, 6)
    if usage.completion_tokens > 1 and now - tally.first_s > _SHORTEST_S:
        yield "tokens_per_s", round((usage.completion_tokens - 1) / (now - tally.first_s), 2)
