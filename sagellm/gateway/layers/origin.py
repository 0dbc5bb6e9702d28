"""Host and Origin: a web page that the operator visits must not reach the gateway."""

import ipaddress
import socket
from urllib.parse import urlsplit

from starlette.types import Scope

from sagellm.gateway.failure import ApiError
from sagellm.gateway.server.listen import is_loopback
from sagellm.gateway.settings import Settings

ANY = "*"

# Domains that no public registry sells, so that no page can have one: RFC 6762 and 8375, ICANN's
# `.internal`, what routers give, and the services of Kubernetes (`.svc`, `.cluster.local`).
_PRIVATE = frozenset({"internal", "local", "svc", "home", "lan", "intranet", "corp", "localdomain"})
_HOME = ".home.arpa"
# What container engines call the machine that they run on; they reach its loopback too.
_CONTAINER_HOSTS = frozenset({"host.docker.internal", "host.containers.internal"})


class Hosts:
    """The names that this gateway answers to.

    An address is always let in: a page reaches a foreign server under a name of its own (DNS
    rebinding), never under the server's address. A private name (`sagellm`, `sagellm.ns.svc`) is
    let in where the gateway listens at more than loopback: no page is served under such a name.
    """

    def __init__(self, settings: Settings) -> None:
        named = (*settings.allowed_hosts, settings.host, "localhost", socket.gethostname())
        self._names = frozenset(name.lower() for name in named) | _CONTAINER_HOSTS
        self._origins = frozenset(settings.allowed_origins)
        self._takes_private = not is_loopback(settings.host)

    def check(self, scope: Scope) -> None:
        """Raises ApiError 421 for a foreign Host, 403 for a foreign Origin, and 403 for what a
        browser says that another site's page asked for.
        """
        host = origins = site = mode = b""
        for name, value in scope["headers"]:
            if name == b"host":
                host = value
            elif name == b"origin":
                origins += b"," + value
            elif name == b"sec-fetch-site":
                site = value
            elif name == b"sec-fetch-mode":
                mode = value
        text = host.decode("latin-1").lower()
        if not self._answers_to(text):
            message = "this host is not served here; the operator may add it with --allowed-host"
            raise ApiError(421, message, code="unknown_host")
        if origins:
            self._check_origin(origins[1:].decode("latin-1"), text)
        elif site in (b"cross-site", b"same-site") and mode != b"navigate":
            raise _foreign()  # an image, a script: only a link may lead here from another site

    def _answers_to(self, host: str) -> bool:
        name = _hostname(host)
        if name is None:
            return False
        if name in self._names or ANY in self._names or _is_address(name):
            return True
        return name.endswith(".localhost") or (self._takes_private and _is_private(name))

    def _check_origin(self, origin: str, host: str) -> None:
        parts = origin.lower().split("://")
        is_own = len(parts) == 2 and parts[0] in ("http", "https") and parts[1] == host
        if not is_own and origin not in self._origins:
            raise _foreign()


def _foreign() -> ApiError:
    return ApiError(403, "requests of other web pages are refused", code="foreign_origin")


def _is_private(name: str) -> bool:
    """A name without a dot, or under a domain that nobody can buy."""
    labels = name.rstrip(".").split(".")
    return len(labels) == 1 or labels[-1] in _PRIVATE or f".{name}".endswith(_HOME)


def _hostname(host: str) -> str | None:
    """The name before the port; None for what is no authority."""
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
