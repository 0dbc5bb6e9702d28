"""One HTTP call: its route, its id, its facts, and its log line."""

import re
import secrets
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
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

Endpoint: TypeAlias = Callable[[Gateway, Request], Awaitable[ASGIApp]]

_PARAMETER = re.compile(r"{(\w+)(:path)?}")
CLIENT_LEFT = 499  # the status for the log and the metrics where the client has gone


@dataclass(frozen=True, slots=True)
class EndpointRoute:
    """A method and a path, and the endpoint that answers them. By default a route needs a key.

    `{name}` in a path is one segment; `{name:path}` may hold slashes. `while_draining`: the route
    answers until the process ends. `generates`: an overloaded server refuses the call first.
    """

    method: str
    path: str
    endpoint: Endpoint
    access: Access = "user"
    while_draining: bool = False
    generates: bool = False


async def not_found(gateway: Gateway, request: Request) -> Response:
    """Answer a path without a route. A caller without a key learns only that a key is needed."""
    raise ApiError(404, no_such_path(request.scope.get("raw_path") or b"", request.scope["paths"]))


async def not_allowed(gateway: Gateway, request: Request) -> Response:
    allowed, path = ", ".join(request.scope["allowed_methods"]), shown(request.scope["raw_path"])
    message = f"{path} does not answer to {_word(request.method)}; it answers to {allowed}"
    response = response_of(ApiError(405, message))
    response.headers["allow"] = allowed
    return response


async def without_slash(gateway: Gateway, request: Request) -> Response:
    """Redirect with method and body (RFC 9110, 15.4.8), always to a path of this server."""
    query = request.scope["query_string"].decode("latin-1")
    target = request.scope["redirected_to"] + (f"?{query}" if query else "")
    return Response(status_code=307, headers={"location": target})


NOT_FOUND = EndpointRoute("GET", "", not_found, while_draining=True)


class RouteTable:
    """Finds the route of a request. Paths are compared byte for byte, before any decoding: //v1,
    /V1 and %2e%2e are unknown paths, which need a key.
    """

    def __init__(self, routes: Iterable[EndpointRoute]) -> None:
        self._exact: dict[bytes, dict[str, EndpointRoute]] = {}
        self._open: list[tuple[re.Pattern[str], dict[str, EndpointRoute]]] = []
        self.paths: tuple[str, ...] = ()
        self.routes = tuple(routes)
        for route in self.routes:
            methods = self._methods(route.path)
            methods[route.method] = route
            if route.method == "GET":
                methods.setdefault("HEAD", route)

    def find(self, scope: Scope) -> EndpointRoute:
        """Return the route of a request, and set `path_params` in the scope. Never fails."""
        methods, parameters = self._lookup(scope.get("raw_path") or b"")
        scope["path_params"] = parameters
        scope["paths"] = self.paths
        if not methods:
            return self._without_slash(scope) or NOT_FOUND
        route = methods.get(scope["method"])
        if route is not None:
            return route
        scope["allowed_methods"] = tuple(methods)
        any_route = next(iter(methods.values()))
        return EndpointRoute(scope["method"], any_route.path, not_allowed, any_route.access, True)

    def _without_slash(self, scope: Scope) -> EndpointRoute | None:
        """Return a redirect where the path is a route's path with one more slash at its end. The
        redirect needs a key, as every unknown path does.
        """
        raw_path: bytes = scope.get("raw_path") or b""
        methods = self._exact.get(raw_path[:-1]) if raw_path.endswith(b"/") else None
        if not methods:
            return None
        route = methods.get(scope["method"]) or next(iter(methods.values()))
        scope["redirected_to"] = route.path
        return EndpointRoute(scope["method"], route.path, without_slash, while_draining=True)

    def _methods(self, path: str) -> dict[str, EndpointRoute]:
        """Return the routes of a path by method; a new path has none."""
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
    parts, end = [], 0
    for match in _PARAMETER.finditer(path):
        value = ".+" if match[2] else "[^/]+"
        parts += [re.escape(path[end : match.start()]), f"(?P<{match[1]}>{value})"]
        end = match.end()
    return re.compile("".join([*parts, re.escape(path[end:])]))


def _word(method: str) -> str:
    """Return a method in a form that is safe to show."""
    return method if method.isalpha() and len(method) <= 16 else "this method"


MAX_PATH_LEN = 120  # characters; clients choose them
_CHAT, _COMPLETIONS = "/v1/chat/completions", "/v1/completions"
# Paths of other APIs, and the route here with the same purpose.
_ELSEWHERE = {
    "/api/chat": _CHAT,
    "/api/generate": _COMPLETIONS,
    "/api/tags": "/v1/models",
    "/generate": _COMPLETIONS,
    "/v1/embeddings": _CHAT,
    "/v1/messages": _CHAT,
    "/v1/messages/count_tokens": "/tokenize",
    "/v1/responses": _CHAT,
}
_UNSAFE = re.compile(rb"[^A-Za-z0-9/._~%{}:@!$&()*+,;=-]")


def shown(raw_path: bytes) -> str:
    """Return a path that is safe to show: bounded, with all but plain characters escaped."""
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
    """The facts of one call, in `request.state.call`. `started_s` is a time of the loop's clock.

    `tenant` is the name of the caller's key; "" before the key was checked.
    """

    request_id: str
    tenant: str = ""
    is_admin: bool = False
    started_s: float = 0.0
    traceparent: str = ""


def read_request_id(headers: Headers) -> str:
    """Return the caller's id if it is one plain word, else a new id."""
    given = _only(headers, b"x-request-id", _REQUEST_ID)
    return given or secrets.token_hex(16)


def read_traceparent(headers: Headers) -> str:
    """Return the W3C trace context, or "" for an invalid header."""
    return _only(headers, b"traceparent", _TRACEPARENT)


def _only(headers: Headers, name: bytes, form: re.Pattern[bytes]) -> str:
    """Return the only value of a header if it has the form, else ""."""
    values = [value for key, value in headers if key == name]  # two values are ambiguous
    return values[0].decode() if len(values) == 1 and form.fullmatch(values[0]) else ""


class OpenCalls:
    """The open calls that a drain waits for. All methods are called on the app's loop.

    `everywhere` counts the calls of all gateways of one graph.
    """

    def __init__(self, everywhere: Counter) -> None:
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
                self._call_waiting()

    def when_idle(self, callback: Callable[[], None]) -> None:
        """Call `callback` once, as soon as no call is open; at once if none is."""
        self._waiting.append(callback)
        if not self.num_open:
            self._call_waiting()

    def _call_waiting(self) -> None:
        waiting, self._waiting = self._waiting, []  # a callback may add another
        for callback in waiting:
            callback()


def new_call(scope: Scope) -> Call:
    """Return a new call, with an unknown caller and an id that is safe in headers and logs."""
    headers = scope["headers"]
    return Call(
        request_id=read_request_id(headers),
        started_s=anyio.current_time(),
        traceparent=read_traceparent(headers),
    )


def echo(call: Call) -> list[tuple[bytes, bytes]]:
    """Return the headers that every response has."""
    processing_ms = round((anyio.current_time() - call.started_s) * 1000)
    return [
        (b"x-request-id", call.request_id.encode()),
        (b"openai-processing-ms", b"%d" % processing_ms),
    ]


_METHOD_LEN = 16
_SHORTEST_S = 1e-3  # the shortest time that gives a meaningful rate


def call_fields(call: Call, scope: Scope, status: int, now: float) -> dict[str, object]:
    """Return the fields of a call's log line, with `error` where the client was shown an error, and
    with token counts where tokens came. `now` is a time of the loop's clock.
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
    """Return the path to show, without its query, which may hold a key."""
    raw: bytes = scope.get("raw_path") or b""
    return shown(raw.partition(b"?")[0])


def client_of(scope: Scope) -> str:
    """Return the address of the connection's other end, which may be a proxy."""
    client = scope.get("client")
    return str(client[0]) if client else ""


def _tokens(call: Call, counter: UsageCounter, now: float) -> Iterator[tuple[str, object]]:
    """Yield token counts and times. The rate counts all choices, from the first token on."""
    usage = counter.usage
    if counter.first_s is None or not usage.completion_tokens:
        return
    yield "num_prompt_tokens", usage.prompt_tokens
    yield "num_output_tokens", usage.completion_tokens
    yield "ttft_s", round(counter.first_s - call.started_s, 6)
    if usage.completion_tokens > 1 and now - counter.first_s > _SHORTEST_S:
        yield "tokens_per_s", round((usage.completion_tokens - 1) / (now - counter.first_s), 2)
