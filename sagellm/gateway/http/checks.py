"""The checks that run before an endpoint: headers, host, origin, key, and size of the body."""

import hmac
import ipaddress
import socket
from dataclasses import dataclass
from hashlib import sha256
from math import inf
from typing import Literal
from urllib.parse import urlsplit

import anyio
from starlette.types import Message, Receive, Scope

from sagellm.gateway.api_errors import ApiError
from sagellm.gateway.settings import RequestLimits, Settings, is_loopback

_OVERHEAD = 4  # bytes of a header line besides name and value: ": " and CR LF
_VERSIONS = ("1.0", "1.1", "2")
_FRAMING = (b"host", b"content-length", b"transfer-encoding")


def check_headers(scope: Scope, limits: RequestLimits) -> None:
    """Raise ApiError 431 for too large headers, and 400 for framing that allows smuggling.

    See RFC 9112, 3.2 and 6.3. The servers below the app reject only a part of such framing.
    """
    headers = scope["headers"]
    if scope["http_version"] not in _VERSIONS:
        raise ApiError(400, "HTTP/1.1 and HTTP/2 are spoken here")
    if len(headers) > limits.num_headers:
        raise ApiError(431, f"more than {limits.num_headers} headers")
    size = len(scope.get("raw_path") or b"") + len(scope["query_string"])
    found: dict[bytes, list[bytes]] = {}
    for name, value in headers:
        size += len(name) + len(value) + _OVERHEAD
        if name in _FRAMING:
            found.setdefault(name, []).append(value)
    if size > limits.header_bytes:
        raise ApiError(431, f"the headers are larger than {limits.header_bytes} bytes")
    _check_framing(found)


def _check_framing(found: dict[bytes, list[bytes]]) -> None:
    hosts = found.get(b"host", [])
    if len(hosts) != 1 or not hosts[0]:
        raise ApiError(400, "a request needs exactly one Host header")
    lengths, encodings = found.get(b"content-length"), found.get(b"transfer-encoding")
    if lengths and encodings:
        raise ApiError(400, "Content-Length and Transfer-Encoding exclude each other")
    if lengths and (len(lengths) > 1 or not lengths[0].isdigit()):
        raise ApiError(400, "Content-Length must be one number")
    if encodings and [one.lower() for one in encodings] != [b"chunked"]:
        raise ApiError(400, "the only Transfer-Encoding is chunked")


ANY = "*"
_ADD_IT = "the operator may add it with --allowed-host"

# Domains that no public registry sells: RFC 6762 and 8375, ICANN's `.internal`, names that routers
# give, and the services of Kubernetes (`.svc`, `.cluster.local`).
_PRIVATE = frozenset({"internal", "local", "svc", "home", "lan", "intranet", "corp", "localdomain"})
_HOME = ".home.arpa"
# Names of a container's host, through which containers reach its loopback.
_CONTAINER_HOSTS = frozenset({"host.docker.internal", "host.containers.internal"})
# Headers that a page cannot suppress. `sec-fetch-mode` is not listed: Node's fetch sends it too.
_OF_BROWSERS = frozenset({b"origin", b"sec-fetch-site", b"sec-fetch-dest"})


class Hosts:
    """The host names under which this gateway answers: a defence against DNS rebinding.

    An IP address is always allowed: DNS rebinding uses a name of the attacker, never the server's
    address. A private name (`sagellm`, `sagellm.ns.svc`) is allowed if the gateway listens beyond
    loopback, but not for browsers: another machine in the network can answer for such a name (mDNS,
    LLMNR, DHCP), serve a page under it, and then point the name at this gateway.
    """

    def __init__(self, settings: Settings) -> None:
        given = {name.lower() for name in (*settings.allowed_hosts, settings.host)}
        self._names = frozenset({*given, "localhost"})
        self._program_names = _CONTAINER_HOSTS | {socket.gethostname().lower()}
        self._origins = frozenset(settings.allowed_origins)
        self._takes_private = not is_loopback(settings.host)

    def check(self, scope: Scope) -> None:
        """Check the headers Host and Origin of a call.

        Raises ApiError 421 for an unknown host, or for a browser that uses a private name. Raises
        ApiError 403 for a foreign origin, or for a request that a page of another site made.
        """
        host = origins = site = mode = b""
        is_browser = False
        for name, value in scope["headers"]:
            is_browser = is_browser or name in _OF_BROWSERS
            if name == b"host":
                host = value
            elif name == b"origin":
                origins += b"," + value
            elif name == b"sec-fetch-site":
                site = value
            elif name == b"sec-fetch-mode":
                mode = value
        text = host.decode("latin-1").lower()
        self._check_host(text, is_browser)
        if origins:
            self._check_origin(origins[1:].decode("latin-1"), text)
        elif site in (b"cross-site", b"same-site") and mode != b"navigate":
            raise _foreign()  # an image or a script of another site; only links may lead here

    def _check_host(self, host: str, is_browser: bool) -> None:
        name = _hostname(host)
        if name is not None and self._is_trusted(name):
            return
        if name is None or not self._is_for_programs(name):
            raise ApiError(421, f"this host is not served here; {_ADD_IT}", code="unknown_host")
        if is_browser:
            message = f"under this name the server answers programs, not browsers; {_ADD_IT}"
            raise ApiError(421, message, code="unknown_host")

    def _is_trusted(self, name: str) -> bool:
        """Whether no attacker can point the name at another address: it is safe for browsers."""
        is_named = name in self._names or ANY in self._names
        return is_named or _is_address(name) or name.endswith(".localhost")

    def _is_for_programs(self, name: str) -> bool:
        """Whether programs, but not browsers, may use the name."""
        return name in self._program_names or (self._takes_private and _is_private(name))

    def _check_origin(self, origin: str, host: str) -> None:
        parts = origin.lower().split("://")
        is_own = len(parts) == 2 and parts[0] in ("http", "https") and parts[1] == host
        if not is_own and origin not in self._origins:
            raise _foreign()


def _foreign() -> ApiError:
    return ApiError(403, "requests of other web pages are refused", code="foreign_origin")


def _is_private(name: str) -> bool:
    """Whether a name has no dot, or belongs to a domain that no public registry sells."""
    labels = name.rstrip(".").split(".")
    return len(labels) == 1 or labels[-1] in _PRIVATE or f".{name}".endswith(_HOME)


def _hostname(host: str) -> str | None:
    """Return the host name of a Host header, without its port; None for an invalid header."""
    if not host or set(host) & set("/\\@?# \t,"):
        return None
    try:
        parts = urlsplit(f"//{host}")
        return parts.hostname if parts.port is None or parts.port > 0 else None
    except ValueError:
        return None


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


Access = Literal["open", "user", "admin", "metrics"]


@dataclass(frozen=True, slots=True)
class Caller:
    """The caller of a call: the tenant that owns the call's key."""

    tenant: str
    is_admin: bool = False


AUTHORIZATION = b"authorization"
ANONYMOUS = Caller("anonymous")
ADMIN = Caller("admin", is_admin=True)


class ApiKeys:
    """All API keys, as hashes.

    A call's key is compared with every known key, so that the time does not reveal which keys
    exist.
    """

    def __init__(self, settings: Settings) -> None:
        self._users = [(name, _digest(key)) for name, key in settings.api_keys.items()]
        self._admin = settings.admin_key and _digest(settings.admin_key)
        self._open_metrics = settings.open_metrics

    def caller(self, scope: Scope, access: Access, key_header: bytes = b"") -> Caller:
        """Return the caller of a call to a route with the given `access`.

        `key_header`: a header that may hold the key, besides Authorization. Raises ApiError 401
        without a known key, and 403 for a user's key on an admin route.
        """
        if access == "open" or (access == "metrics" and self._open_metrics):
            return ANONYMOUS
        caller = self._known(_digest_of(scope, key_header))
        if caller is None:
            raise ApiError(401, "a valid API key is needed", code="invalid_api_key")
        if access == "admin" and not caller.is_admin:
            raise ApiError(403, "this needs the admin key", code="admin_only")
        return caller

    def _known(self, given: bytes) -> Caller | None:
        found = None if self._users else ANONYMOUS
        for name, digest in self._users:
            if hmac.compare_digest(given, digest):
                found = Caller(name)
        if self._admin and hmac.compare_digest(given, self._admin):
            found = ADMIN
        return found


def tenants(settings: Settings) -> tuple[str, ...]:
    """Return the names of all tenants that `ApiKeys.caller` can return."""
    return (*settings.api_keys, ADMIN.tenant, ANONYMOUS.tenant)


def _digest(key: str) -> bytes:
    # Hashes have one length, so a comparison does not reveal the length of a key.
    return sha256(key.encode()).digest()


def _digest_of(scope: Scope, key_header: bytes) -> bytes:
    """Return the hash of a call's key. Without exactly one key, the hash matches no known key."""
    given = [pair for pair in scope["headers"] if pair[0] in (AUTHORIZATION, key_header)]
    keys = {_bearer(value) if name == AUTHORIZATION else value.strip() for name, value in given}
    if len(keys) != 1 or len(given) != len(dict(given)):  # both headers may hold the same key
        return bytes(32)
    return sha256(keys.pop()).digest()


def _bearer(value: bytes) -> bytes:
    """Return the key in an Authorization header; another scheme has the empty key."""
    scheme, _, key = value.partition(b" ")
    return key.strip() if scheme.lower() == b"bearer" else b""


BODIES_RETRY_S = 1.0


class OpenBodies:
    """The total size of the bodies of all open calls, in bytes, and its bound.

    The bound limits memory: each body is kept, as text and as tokens, until its call ends.
    """

    def __init__(self, limits: RequestLimits) -> None:
        self._limit = limits.all_bodies_bytes
        self.num_bytes = 0

    def check(self, num_bytes: float, own_bytes: int = 0) -> None:
        """Raise ApiError 503 if `num_bytes` more bytes would exceed the bound.

        `own_bytes`: the bytes of the total that belong to the same body. A body larger than the
        bound is accepted if it is the only one.
        """
        if self.num_bytes + num_bytes > self._limit and self.num_bytes > own_bytes:
            message = "the server holds too many large requests; try again"
            raise ApiError(503, message, code="too_many_bodies", retry_after_s=BODIES_RETRY_S)


class RequestBody:
    """Wraps `receive` for one body, and enforces its limits of size and time.

    `is_whole`: the whole body has been read. `read_s`: when the last part was read, a time of the
    loop's clock; None until then. The TTFT of a call counts from `read_s`, not from its headers.
    """

    def __init__(
        self,
        scope: Scope,
        receive: Receive,
        limits: RequestLimits,
        started_s: float,
        bodies: OpenBodies,
    ) -> None:
        self._receive = receive
        self._limits = limits
        self._bodies = bodies
        self._deadline_s = started_s + limits.body_s
        self._num_bytes = 0
        self.is_whole = not _has_body(scope)
        self.read_s: float | None = None

    async def receive(self) -> Message:
        """Return the next message. Raises ApiError 413 if the body is too large, 408 if it is too
        slow, and 503 if all open bodies together are too large.
        """
        if self.is_whole:
            return await self._receive()
        with anyio.CancelScope(deadline=self._deadline_s) as late:
            return self._counted(await self._receive())
        assert late.cancelled_caught
        raise ApiError(408, f"the body took longer than {self._limits.body_s:g} s")

    def _counted(self, message: Message) -> Message:
        num_bytes = len(message.get("body", b""))
        self.is_whole = not message.get("more_body", False)
        if self.is_whole:
            self.read_s = anyio.current_time()
        if self._num_bytes + num_bytes > self._limits.body_bytes:
            raise too_large(self._limits)
        self._bodies.check(num_bytes, self._num_bytes)
        self._num_bytes += num_bytes
        self._bodies.num_bytes += num_bytes
        return message

    def drop(self) -> None:
        """Take the body out of the total size of open bodies. Later calls do nothing."""
        self._bodies.num_bytes -= self._num_bytes
        self._num_bytes = 0

    async def discard(self) -> None:
        """Read and drop the rest of the body, until its end, a disconnect or the deadline.

        Some servers end a call only after the app has read the whole body.
        """
        with anyio.CancelScope(deadline=self._deadline_s):
            more = not self.is_whole
            while more:
                more = (await self._receive()).get("more_body", False)
            self.is_whole = True


def check_body(scope: Scope, limits: RequestLimits, bodies: OpenBodies) -> None:
    """Check the body by its headers, before it is read.

    Raises ApiError 413 if it is too large, 415 if it is compressed, and 503 if all open bodies
    together are too large.
    """
    for name, value in scope["headers"]:
        if name == b"content-encoding" and value.strip().lower() not in (b"", b"identity"):
            raise ApiError(415, "compressed bodies are not taken", param="content-encoding")
        if name == b"content-length":
            if read_length(value) > limits.body_bytes:
                raise too_large(limits)
            bodies.check(read_length(value))


def too_large(limits: RequestLimits) -> ApiError:
    return ApiError(413, f"the body is larger than {limits.body_bytes} bytes")


def read_length(value: bytes) -> float:
    """Return the number of a Content-Length header; infinity if it has more than 18 digits."""
    # Converting a very long number to an integer would take long.
    digits = value.lstrip(b"0")
    return inf if len(digits) > 18 else int(digits or b"0")


def _has_body(scope: Scope) -> bool:
    """Whether the call may have a body. HTTP/2 announces a body by no header."""
    named = any(name in (b"content-length", b"transfer-encoding") for name, _ in scope["headers"])
    return named or scope["http_version"] == "2"
