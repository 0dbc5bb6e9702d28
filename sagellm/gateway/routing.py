"""The route table: exact paths, and the nearest one where a path is unknown."""

import re
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from typing import TypeAlias
from urllib.parse import unquote

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Scope

from sagellm.gateway.errors import ApiError, response_of
from sagellm.gateway.gateway import Gateway
from sagellm.gateway.layers.access import Access

Endpoint: TypeAlias = Callable[[Gateway, Request], Awaitable[Response]]

_PARAMETER = re.compile(r"{(\w+)(:path)?}")


@dataclass(frozen=True, slots=True)
class Route:
    """What one path answers to. Whoever forgets `access` has a route that needs the key.

    `{name}` in a path is one segment, `{name:path}` may hold slashes. `while_draining`: it answers
    until the process ends. `generates`: it is refused first where the server has too much to do.
    """

    method: str
    path: str
    endpoint: Endpoint
    access: Access = "user"
    while_draining: bool = False
    generates: bool = False


async def not_found(gateway: Gateway, request: Request) -> Response:
    """What there is no route for; a caller without a key learns only that it needs one."""
    raise ApiError(404, no_such_path(request.scope.get("raw_path") or b"", request.scope["paths"]))


async def not_allowed(gateway: Gateway, request: Request) -> Response:
    allowed, path = ", ".join(request.scope["allowed_methods"]), shown(request.scope["raw_path"])
    message = f"{path} does not answer to {_word(request.method)}; it answers to {allowed}"
    response = response_of(ApiError(405, message))
    response.headers["allow"] = allowed
    return response


async def without_slash(gateway: Gateway, request: Request) -> Response:
    """Keeps method and body (RFC 9110, 15.4.8). The target is a route's path: of this server."""
    query = request.scope["query_string"].decode("latin-1")
    target = request.scope["redirected_to"] + (f"?{query}" if query else "")
    return Response(status_code=307, headers={"location": target})


NOT_FOUND = Route("GET", "", not_found, while_draining=True)


class Table:
    """Paths are compared byte for byte, before any decoding: //v1, /V1 and %2e%2e are no routes,
    and so need a key and lead nowhere.
    """

    def __init__(self, routes: Iterable[Route]) -> None:
        self._exact: dict[bytes, dict[str, Route]] = {}
        self._open: list[tuple[re.Pattern[str], dict[str, Route]]] = []
        self.paths: tuple[str, ...] = ()
        self.routes = tuple(routes)
        for route in self.routes:
            methods = self._methods(route.path)
            methods[route.method] = route
            if route.method == "GET":
                methods.setdefault("HEAD", route)

    def find(self, scope: Scope) -> Route:
        """The route of a request; sets `path_params` in the scope. Never fails."""
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
        return Route(scope["method"], any_route.path, not_allowed, any_route.access, True)

    def _without_slash(self, scope: Scope) -> Route | None:
        """A redirect, where the path is that of a route but for one slash at its end. It needs
        the key, as every path does that is no route.
        """
        raw_path: bytes = scope.get("raw_path") or b""
        methods = self._exact.get(raw_path[:-1]) if raw_path.endswith(b"/") else None
        if not methods:
            return None
        route = methods.get(scope["method"]) or next(iter(methods.values()))
        scope["redirected_to"] = route.path
        return Route(scope["method"], route.path, without_slash, while_draining=True)

    def _methods(self, path: str) -> dict[str, Route]:
        """The routes of one path, which is new or known."""
        if path in self.paths:
            return self._lookup(path.encode())[0]
        self.paths += (path,)
        methods: dict[str, Route] = {}
        if "{" in path:
            self._open.append((_pattern(path), methods))
        else:
            self._exact[path.encode()] = methods
        return methods

    def _lookup(self, raw_path: bytes) -> tuple[dict[str, Route], Mapping[str, str]]:
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
    """A method fit for an answer."""
    return method if method.isalpha() and len(method) <= 16 else "this method"


MAX_PATH_LEN = 120  # characters: a client chooses them
_CHAT, _COMPLETIONS = "/v1/chat/completions", "/v1/completions"
# Paths of other APIs, and the route here that does what they do.
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
    """A path fit for answers and logs: bounded, and anything but plain characters escaped."""
    text = _UNSAFE.sub(lambda found: b"%%%02X" % found[0][0], raw_path[: MAX_PATH_LEN + 1]).decode()
    return text if len(text) <= MAX_PATH_LEN else f"{text[:MAX_PATH_LEN]}..."


def no_such_path(raw_path: bytes, paths: Iterable[str]) -> str:
    """The message of a 404. `paths` are those of the routes."""
    path = shown(raw_path)
    known = _ELSEWHERE.get(path.rstrip("/"))
    if known is not None:
        return f"{path} is not built; this server has {known}"
    plain = [each for each in paths if "{" not in each]
    near = get_close_matches(path.lower(), plain, n=1, cutoff=0.7)
    told = f"there is no such path: {path}"
    return f"{told}; did you mean {near[0]}?" if near else f"{told}; /docs lists those there are"
