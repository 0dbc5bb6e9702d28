"""One HTTP call: the route table, the call's id and caller, and its log line."""

import re
import secrets
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from difflib import get_close_matches
from typing import TypeAlias
from urllib.parse import unquote

import anyio
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Scope

from sagellm.gateway.answers.writer import UsageCounter
from sagellm.gateway.api_errors import ApiError, response_of
from sagellm.gateway.budgets import Counter
from sagellm.gateway.gateway import Gateway
from sagellm.gateway.http.checks import Access
from sagellm.gateway.http.dialects import OPENAI, ApiDialect

Endpoint: TypeAlias = Callable[[Gateway, Request], Awaitable[ASGIApp]]

_PARAMETER = re.compile(r"{(\w+)(:path)?}")
CLIENT_LEFT = 499  # nginx's status for a client that left first; seen in the log and the metrics


@dataclass(frozen=True, slots=True)
class EndpointRoute:
    """A method and a path, and the endpoint that answers them. By default a route needs a key.

    In a path, `{name}` matches one segment, and `{name:path}` may match slashes. `while_draining`:
    the route answers during a drain. `generates`: it makes tokens, so an overloaded server refuses
    its calls. `dialect`: the API of its clients. `uploads`: the body goes to the disk. `quiet_on`:
    statuses of calls that are logged at level debug, for routes that are called again and again.
    """

    method: str
    path: str
    endpoint: Endpoint
    access: Access = "user"
    while_draining: bool = False
    generates: bool = False
    dialect: ApiDialect = OPENAI
    uploads: bool = False
    quiet_on: tuple[int, ...] = ()


async def not_found(gateway: Gateway, request: Request) -> Response:
    """Answer 404. The key is checked first, so a caller without a key only gets a 401."""
    raise ApiError(404, no_such_path(request.scope.get("raw_path") or b"", request.scope["paths"]))


async def not_allowed(gateway: Gateway, request: Request) -> Response:
    """Answer 405 for a known path with another method."""
    allowed, path = ", ".join(request.scope["allowed_methods"]), shown(request.scope["raw_path"])
    message = f"{path} does not answer to {_word(request.method)}; it answers to {allowed}"
    error, dialect = ApiError(405, message), request.scope["dialect"]
    response = response_of(error, dialect.error_body(error, request.state.call.request_id))
    response.headers["allow"] = allowed
    return response


async def without_slash(gateway: Gateway, request: Request) -> Response:
    """Redirect to the path without its last slash; the client repeats method and body.

    The target is always a path of this server (RFC 9110, 15.4.8).
    """
    query = request.scope["query_string"].decode("latin-1")
    target = request.scope["redirected_to"] + (f"?{query}" if query else "")
    return Response(status_code=307, headers={"location": target})


NOT_FOUND = EndpointRoute("GET", "", not_found, while_draining=True)


class RouteTable:
    """Finds the route of a request.

    Paths are compared byte for byte, without decoding. So //v1, /V1 and %2e%2e are unknown paths,
    and unknown paths need a key.
    """

    def __init__(self, routes: Iterable[EndpointRoute]) -> None:
        self._exact: dict[bytes, dict[str, EndpointRoute]] = {}
        self._open: list[tuple[re.Pattern[str], dict[str, EndpointRoute]]] = []
        self.paths: tuple[str, ...] = ()
        self.routes = tuple(routes)
        for route in self.routes:
            methods = self._methods(route.path)
            methods[route.method] = route
            if route.method == "GET":  # servers send no body in an answer to HEAD
                methods.setdefault("HEAD", route)

    def find(self, scope: Scope) -> EndpointRoute:
        """Return the route of a request, and set `path_params` in its scope.

        A request without a route gets a route that answers 404, 405 or a redirect.
        """
        methods, parameters = self._lookup(scope.get("raw_path") or b"")
        scope["path_params"] = parameters
        scope["paths"] = self.paths
        if not methods:
            return self._without_slash(scope) or self._not_found(scope)
        route = methods.get(scope["method"])
        if route is not None:
            return route
        # The 405 needs the same key as the path's routes, so it reveals no admin path.
        any_route = next(iter(methods.values()))
        scope["allowed_methods"], scope["dialect"] = tuple(methods), any_route.dialect
        return replace(
            any_route,
            method=scope["method"],
            endpoint=not_allowed,
            while_draining=True,
            generates=False,
        )

    def _without_slash(self, scope: Scope) -> EndpointRoute | None:
        """Return a redirect if the path is the path of a route with one slash at its end.

        The redirect needs a key, like every unknown path.
        """
        raw_path: bytes = scope.get("raw_path") or b""
        methods = self._exact.get(raw_path[:-1]) if raw_path.endswith(b"/") else None
        if not methods:
            return None
        route = methods.get(scope["method"]) or next(iter(methods.values()))
        scope["redirected_to"] = route.path
        return EndpointRoute(
            scope["method"], route.path, without_slash, while_draining=True, dialect=route.dialect
        )

    def _not_found(self, scope: Scope) -> EndpointRoute:
        """Return the route of an unknown path, in the dialect of the known path above it."""
        raw_path: bytes = scope.get("raw_path") or b""
        for known, methods in self._exact.items():
            dialect = next(iter(methods.values())).dialect
            if dialect is not NOT_FOUND.dialect and raw_path.startswith(known + b"/"):
                return replace(NOT_FOUND, dialect=dialect)
        return NOT_FOUND

    def _methods(self, path: str) -> dict[str, EndpointRoute]:
        """Return the routes of a path, by method. Add the path if it is new."""
        if path in self.paths:
            return self._lookup(path.encode())[0]
        self.paths += (path,)
        methods: dict[str, EndpointRoute] = {}
        if "{" in path:
            self._open.append((_pattern(path), methods))
        else:
            self._exact[path.encode()] = methods
        return methods

    def _lookup(self, raw_path: bytes) -> tuple[dict[str, EndpointRoute], Mapping[str, str]]:
        known = self._exact.get(raw_path)
        if known is not None:
            return known, {}
        text = raw_path.decode("latin-1")
        for pattern, methods in self._open:
            match = pattern.fullmatch(text)
            if match:
                return methods, {name: unquote(value) for name, value in match.groupdict().items()}
        return {}, {}


def _pattern(path: str) -> re.Pattern[str]:
    """Return the pattern of a path with parameters, with one group for each parameter."""
    parts, end = [], 0
    for match in _PARAMETER.finditer(path):
        value = ".+" if match[2] else "[^/]+"
        parts += [re.escape(path[end : match.start()]), f"(?P<{match[1]}>{value})"]
        end = match.end()
    return re.compile("".join([*parts, re.escape(path[end:])]))


def _word(method: str) -> str:
    """Return an HTTP method for a message, or "this method" if it is not safe to show."""
    return method if method.isalpha() and len(method) <= 16 else "this method"


MAX_PATH_LEN = 120  # characters of a path in messages and logs: clients choose paths
_CHAT, _COMPLETIONS = "/v1/chat/completions", "/v1/completions"
# Paths of other APIs -> the route of this server with the same purpose.
_ELSEWHERE = {
    "/api/chat": _CHAT,
    "/api/generate": _COMPLETIONS,
    "/api/tags": "/v1/models",
    "/generate": _COMPLETIONS,
    "/api/embed": "/v1/embeddings",
    "/embed": "/v1/embeddings",
}
_UNSAFE = re.compile(rb"[^A-Za-z0-9/._~%{}:@!$&()*+,;=-]")


def shown(raw_path: bytes) -> str:
    """Return a path for messages and logs: cut to MAX_PATH_LEN, with unsafe bytes escaped."""
    text = _UNSAFE.sub(lambda found: b"%%%02X" % found[0][0], raw_path[: MAX_PATH_LEN + 1]).decode()
    return text if len(text) <= MAX_PATH_LEN else f"{text[:MAX_PATH_LEN]}..."


def no_such_path(raw_path: bytes, paths: Iterable[str]) -> str:
    """Return the message of a 404. `paths` are the paths of the routes."""
    path = shown(raw_path)
    known = _ELSEWHERE.get(path.rstrip("/"))
    if known is not None:
        return f"{path} is not built; this server has {known}"
    plain = [each for each in paths if "{" not in each]
    near = get_close_matches(path.lower(), plain, n=1, cutoff=0.7)
    told = f"there is no such path: {path}"
    return f"{told}; did you mean {near[0]}?" if near else f"{told}; /docs lists those there are"


Headers = Iterable[tuple[bytes, bytes]]

_REQUEST_ID = re.compile(rb"[A-Za-z0-9._-]{1,128}")
_TRACEPARENT = re.compile(rb"[0-9a-f]{2}-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}")


@dataclass(frozen=True, slots=True)
class Call:
    """One call, as kept in `request.state.call`. `started_s` is a time of the loop's clock.

    `tenant` is the name of the caller's key; "" until the key is checked. `is_background`: the call
    is a request of a batch, which runs at the lowest priority and outside the tenant's budget.
    """

    request_id: str
    tenant: str = ""
    is_admin: bool = False
    started_s: float = 0.0
    traceparent: str = ""
    is_background: bool = False


def read_request_id(headers: Headers) -> str:
    """Return the client's x-request-id if it is one plain word, else a new id."""
    given = _only(headers, b"x-request-id", _REQUEST_ID)
    return given or secrets.token_hex(16)


def read_traceparent(headers: Headers) -> str:
    """Return the `traceparent` header (W3C Trace Context), or "" if it is missing or invalid."""
    return _only(headers, b"traceparent", _TRACEPARENT)


def _only(headers: Headers, name: bytes, form: re.Pattern[bytes]) -> str:
    """Return the value of a header that occurs once and matches `form`, else ""."""
    values = [value for key, value in headers if key == name]  # two values are ambiguous
    return values[0].decode() if len(values) == 1 and form.fullmatch(values[0]) else ""


class OpenCalls:
    """Counts the open calls, for which a drain waits. All methods are called on the app's loop.

    `everywhere` counts the open calls of all gateways of one graph.
    """

    def __init__(self, everywhere: Counter) -> None:
        self.num_open = 0
        self.everywhere = everywhere
        self._waiting: list[Callable[[], None]] = []

    @contextmanager
    def open(self) -> Iterator[None]:
        """Count one call as open during the `with` block."""
        self.num_open += 1
        self.everywhere.add(1)
        try:
            yield
        finally:
            self.num_open -= 1
            self.everywhere.add(-1)
            if not self.num_open:
                self._call_waiting()

    def when_idle(self, callback: Callable[[], None]) -> None:
        """Call `callback` once, as soon as no call is open: immediately if none is open now."""
        self._waiting.append(callback)
        if not self.num_open:
            self._call_waiting()

    def _call_waiting(self) -> None:
        waiting, self._waiting = self._waiting, []  # a callback may add a callback
        for callback in waiting:
            callback()


def new_call(scope: Scope) -> Call:
    """Return the call of a scope, before its key is checked. Its id is safe in headers and logs."""
    headers = scope["headers"]
    return Call(
        request_id=read_request_id(headers),
        started_s=anyio.current_time(),
        traceparent=read_traceparent(headers),
    )


def echo(call: Call, dialect: ApiDialect = OPENAI) -> list[tuple[bytes, bytes]]:
    """Return the headers that every response carries: the request id and the processing time."""
    processing_ms = round((anyio.current_time() - call.started_s) * 1000)
    request_id = call.request_id.encode()
    return [
        (b"x-request-id", request_id),
        (b"openai-processing-ms", b"%d" % processing_ms),
        *((name, request_id) for name in dialect.id_headers),
    ]


_METHOD_LEN = 16
_SHORTEST_S = 1e-3  # a rate over a shorter time is noise


def call_fields(call: Call, scope: Scope, status: int, now: float) -> dict[str, object]:
    """Return the fields of a call's log line. `now` is a time of the loop's clock.

    There is an `error` if the client got one, and there are token counts if tokens were made.
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
    counter: UsageCounter | None = scope["state"].get("usage")
    return fields if counter is None else fields | dict(_tokens(call, counter, now))


def path_of(scope: Scope) -> str:
    """Return a call's path for the log. The query is left out, because it may contain a key."""
    raw: bytes = scope.get("raw_path") or b""
    return shown(raw.partition(b"?")[0])


def client_of(scope: Scope) -> str:
    """Return the address of the peer, which may be a proxy; "" if unknown."""
    client = scope.get("client")
    return str(client[0]) if client else ""


def _tokens(call: Call, counter: UsageCounter, now: float) -> Iterator[tuple[str, object]]:
    """Yield the token counts, TTFT and token rate of a call; nothing if no token was made."""
    # The rate covers the tokens of all choices after the first token.
    usage = counter.usage
    if counter.first_s is None or not usage.completion_tokens:
        return
    yield "num_prompt_tokens", usage.prompt_tokens
    yield "num_output_tokens", usage.completion_tokens
    yield "ttft_s", round(counter.first_s - call.started_s, 6)
    if usage.completion_tokens > 1 and now - counter.first_s > _SHORTEST_S:
        yield "tokens_per_s", round((usage.completion_tokens - 1) / (now - counter.first_s), 2)
