"""The socket that is served, bound before anything is loaded, and the lines that announce it."""

import ipaddress
import os
import resource
import shlex
import socket
from collections.abc import Sequence
from contextlib import suppress
from os import listdir

import msgspec

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


KEY_VARIABLE = "SAGELLM_API_KEY"
_ANY_HOST = {"0.0.0.0": "127.0.0.1", "[::]": "[::1]"}


def banner(url: str, models: Sequence[str], settings: Settings, *, has_chat: bool) -> str:
    """Lines for people; the last one asks the first model from a shell. No key is in them."""
    reachable, model, named = _reachable(url), models[0], ", ".join(models)
    word = "models" if len(models) > 1 else "model"
    lines = [
        f"sagellm serves {named} at {url}",
        f"  base URL: {reachable}/v1   {word}: {named}",
        f"  {curl(reachable, model, settings, has_chat=has_chat)}",
    ]
    if settings.api_keys and not _is_key(settings):
        lines.insert(2, f"  with a key of yours in {KEY_VARIABLE}:")
    if settings.page:
        lines.insert(2, f"  in a browser: {reachable}/   its API: {reachable}/docs")
    return "\n".join(lines)


def curl(url: str, model: str, settings: Settings, *, has_chat: bool) -> str:
    """A command that asks the model for something short."""
    asked: dict[str, object] = {"model": model, "max_tokens": 64}
    if has_chat:
        path, asked["messages"] = "chat/completions", [{"role": "user", "content": "Hello"}]
    else:
        path, asked["prompt"] = "completions", "Hello"
    parts = ["curl", f"{url}/v1/{path}"]
    if settings.tls_certificate is not None:
        parts += ["--cacert", shlex.quote(str(settings.tls_certificate))]
    if settings.api_keys:
        parts += ["-H", f'"Authorization: Bearer {_key(settings)}"']
    parts += ["-H", "'Content-Type: application/json'"]
    return " ".join([*parts, "-d", shlex.quote(msgspec.json.encode(asked).decode())])


def _key(settings: Settings) -> str:
    """The variable, as the shell expands it; without the name where it is NAME=KEY."""
    return f"${{{KEY_VARIABLE}#*=}}" if _is_named_key(settings) else f"${KEY_VARIABLE}"


def _is_key(settings: Settings) -> bool:
    """Whether what the command sends is a key of this server."""
    given = os.environ.get(KEY_VARIABLE, "")
    return given in settings.api_keys.values() or _is_named_key(settings)


def _is_named_key(settings: Settings) -> bool:
    keys, given = settings.api_keys.values(), os.environ.get(KEY_VARIABLE, "")
    return given not in keys and given.partition("=")[2] in keys


def _reachable(url: str) -> str:
    """The same for a client on this machine, where the server listens at every address."""
    scheme, _, rest = url.partition("://")
    host, _, port = rest.rpartition(":")
    return f"{scheme}://{_ANY_HOST.get(host, host)}:{port}"
