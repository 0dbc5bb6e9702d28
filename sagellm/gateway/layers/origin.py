"""Host and Origin: a web page that the operator visits must not reach the gateway."""

import ipaddress
import socket
from urllib.parse import urlsplit

from starlette.types import Scope

from sagellm.gateway.failure import ApiError
from sagellm.gateway.settings import Settings

ANY = "*"


class Hosts:
    """The names that this gateway answers to.

    An address is always let in: a page reaches a foreign server under a name of its own (DNS
    rebinding), never under the server's address.
    """

    def __init__(self, settings: Settings) -> None:
        named = (*settings.allowed_hosts, settings.host, "localhost", socket.gethostname())
        self._names = frozenset(name.lower() for name in named)
        self._origins = frozenset(settings.allowed_origins)

    def check(self, scope: Scope) -> None:
        """Raises ApiError 421 for a foreign Host, 403 for a foreign Origin."""
        host = origins = b""
        for name, value in scope["headers"]:
            if name == b"host":
                host = value
            elif name == b"origin":
                origins += b"," + value
        text = host.decode("latin-1").lower()
        if not self._answers_to(text):
            message = "this host is not served here; the operator may add it with --allowed-host"
            raise ApiError(421, message, code="unknown_host")
        if origins:
            self._check_origin(origins[1:].decode("latin-1"), text)

    def _answers_to(self, host: str) -> bool:
        name = _hostname(host)
        return name is not None and (name in self._names or ANY in self._names or _is_address(name))

    def _check_origin(self, origin: str, host: str) -> None:
        parts = origin.lower().split("://")
        is_own = len(parts) == 2 and parts[0] in ("http", "https") and parts[1] == host
        if not is_own and origin not in self._origins:
            raise ApiError(403, "requests of other web pages are refused", code="foreign_origin")


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
