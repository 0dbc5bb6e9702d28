"""The socket that is served: bound before anything is loaded."""

import ipaddress
import resource
import socket
from contextlib import suppress
from os import listdir

from sagellm.gateway.settings import Settings

BACKLOG = 4096  # the kernel takes less where net.core.somaxconn says so
MOST_FILES = 1 << 20  # more than any machine serves
LEAST_FILES = 64  # to start at all: with fewer, sockets of the graph's processes cannot be made
_SPARE_FILES = 48  # for the engine, the logs and whoever opens a file while the gateway is full


def bind(host: str, port: int) -> socket.socket:
    """A socket that takes no connections yet. Raises OSError: in use, not ours, not known."""
    family, kind, protocol, _, address = socket.getaddrinfo(
        host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
    )[0]
    sock = socket.socket(family, kind, protocol)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)  # clients that vanished
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.bind(address)
    except OSError:
        sock.close()
        raise
    sock.setblocking(False)
    return sock


def url_of(sock: socket.socket, settings: Settings) -> str:
    host, port = sock.getsockname()[:2]
    shown = f"[{host}]" if ":" in host else host
    return f"{'https' if settings.tls_key else 'http'}://{shown}:{port}"


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach what is bound to `host`."""
    if host.lower() == "localhost":
        return True
    with suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return False


def max_connections() -> int:
    """As many as leave some file descriptors to the rest of the process."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return max(8, min(soft, MOST_FILES) - _SPARE_FILES - _num_open_files())


def raise_open_files() -> None:
    """Let this process, and those that it starts, open as many files as the system lets it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MOST_FILES if hard == resource.RLIM_INFINITY else min(hard, MOST_FILES)
    if 0 <= soft < wanted:
        with suppress(OSError, ValueError):  # a sandbox may forbid it: serve with what there is
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def num_files() -> int:
    """How many files this process may have open."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return MOST_FILES if soft == resource.RLIM_INFINITY else soft


def _num_open_files() -> int:
    with suppress(OSError):
        return len(listdir("/proc/self/fd"))
    return 0
