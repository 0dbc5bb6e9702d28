"""The settings of one gateway, its listening socket, and the banner that announces it."""

import ipaddress
import os
import resource
import shlex
import socket
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from os import listdir
from pathlib import Path
from typing import Annotated, Literal, TypeAlias

import msgspec
from msgspec import Meta

PositiveInt: TypeAlias = Annotated[int, Meta(ge=1)]
Bytes: TypeAlias = Annotated[int, Meta(ge=1, extra={"unit": "bytes"})]
PositiveSeconds: TypeAlias = Annotated[float, Meta(gt=0)]
Bound: TypeAlias = Annotated[int, Meta(ge=0)]
Rate: TypeAlias = Annotated[float, Meta(ge=0)]


@dataclass(frozen=True, slots=True)
class RequestLimits:
    """The limits of a request. Larger requests are refused. Sizes in bytes, times in seconds."""

    header_bytes: Annotated[int, Meta(ge=256, extra={"unit": "bytes"})] = 16 << 10
    """Size of the request line and all headers."""

    num_headers: PositiveInt = 100
    """Headers of one request."""

    header_s: PositiveSeconds = 10.0
    """Time until the headers are whole."""

    body_bytes: Bytes = 8 << 20
    """Size of a body."""

    all_bodies_bytes: Bytes = 256 << 20
    """Size of the bodies of all open calls of a process."""

    body_s: PositiveSeconds = 30.0
    """Time until the body is whole."""

    json_depth: Annotated[int, Meta(ge=4, le=512)] = 32
    """Levels of JSON inside each other."""

    num_prompts: PositiveInt = 1024
    """Prompts of one call."""

    num_messages: PositiveInt = 2048
    """Messages of one chat."""

    num_choices: PositiveInt = 16
    """`n`, the choices of each prompt."""

    num_stop: PositiveInt = 16
    """Stop strings."""

    stop_bytes: Bytes = 1024
    """Size of one stop string."""

    num_logit_bias: PositiveInt = 1024
    """Entries of `logit_bias`."""

    model_name_len: PositiveInt = 256
    """Characters of the name of a model."""


@dataclass(frozen=True, slots=True)
class Streaming:
    """Limits on sending answers."""

    keep_alive_s: PositiveSeconds = 5.0
    """Silence of a stream until a comment is sent."""

    num_buffered_tokens: Annotated[int, Meta(ge=4)] = 256
    """Tokens kept for a client that does not read."""

    num_buffered_bytes: Annotated[int, Meta(ge=1024, extra={"unit": "bytes"})] = 64 << 10
    """Size of the text kept for a client that does not read."""

    stall_s: PositiveSeconds = 30.0
    """Time after which a client that does not read is cut off."""


@dataclass(frozen=True, slots=True)
class Budget:
    """Bounds on the requests that one key may have open, and may cancel. 0: no bound."""

    num_open: Bound = 1024
    """Requests under way, streaming or waiting: each choice of each prompt is one; 0: no bound."""

    num_waiting: Bound = 1024
    """Requests under way without a first token; 0: no bound."""

    cancels_per_s: Rate = 100.0
    """Cancelled calls a second, after `num_open` at once; 0: no bound."""


@dataclass(frozen=True, slots=True)
class StorageLimits:
    """Limits on uploaded files and batches, which `data_dir` holds."""

    upload_bytes: Bytes = 200 << 20
    """Size of an uploaded file."""

    upload_s: PositiveSeconds = 600.0
    """Time until an uploaded file is whole."""

    num_files: PositiveInt = 1000
    """Files of one key, those of results too."""

    files_bytes: Bytes = 4 << 30
    """Size of the files of one key, those of results too."""

    all_files_bytes: Bytes = 16 << 30
    """Size of the files of all keys."""

    num_batches: PositiveInt = 64
    """Batches of one key that have not ended."""

    num_batch_requests: PositiveInt = 50_000
    """Requests of one batch."""

    num_batch_calls: PositiveInt = 16
    """Requests of batches under way in each process that speaks HTTP."""


_FORM_BYTES = 64 << 10  # of an upload besides the file: its fields, and the heads of its parts

# Without keys all clients share one budget, so a bound for one client would bound all of them.
GRAPH_ALONE = Budget(num_open=0, num_waiting=0, cancels_per_s=0.0)


@dataclass(frozen=True, slots=True)
class Settings:
    """The settings of one gateway.

    `api_keys` maps a tenant's name to its key; if it is empty, no key is needed. `served_models`
    are the names that clients may use for the model; answers show the first name. `admin_key` is
    the key of the admin routes; without it these routes are closed. `salt_key` is the key of the
    prefix-cache salts and of the hashes in logs; the default is a random key at each start. Raises
    ValueError if only one of `tls_certificate` and `tls_key` is given.

    `data_dir` is the folder of uploaded files and batches; None closes their endpoints.

    `budgets` maps a tenant to its own budget; other tenants have `budget`, which defaults to
    `Budget()` if there are keys. Without keys, only the graph's admission bounds requests.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    server: Literal["hypercorn", "uvicorn"] = "hypercorn"
    num_gateways: int = 0  # gateway processes; 0: the graph's process serves HTTP itself
    api_keys: dict[str, str] = field(default_factory=dict, repr=False)
    admin_key: str | None = field(default=None, repr=False)
    salt_key: bytes = field(default=b"", repr=False)
    served_models: tuple[str, ...] = ()
    allowed_hosts: tuple[str, ...] = ()  # in addition to the served address and localhost
    allowed_origins: tuple[str, ...] = ()
    drain_s: float = 600.0  # the most time for open streams to end after SIGTERM
    linger_s: float = 0.0  # the least time of a drain, so that load balancers see the 503
    metrics_compat: tuple[str, ...] = ("vllm",)
    open_metrics: bool = False  # True: /metrics needs no key
    otlp_endpoint: str | None = None  # URL of the OpenTelemetry collector for traces
    trace_sample: float = 0.01  # share of the requests that are traced
    page: bool = True  # serve the chat page at /
    tls_certificate: Path | None = None
    tls_key: Path | None = None
    data_dir: Path | None = None
    limits: RequestLimits = RequestLimits()
    streaming: Streaming = Streaming()
    storage: StorageLimits = StorageLimits()
    budget: Budget | None = None
    budgets: dict[str, Budget] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if (self.tls_certificate is None) != (self.tls_key is None):
            raise ValueError("TLS needs both a certificate and its key")

    @property
    def common_budget(self) -> Budget:
        """The budget of each tenant that is not in `budgets`."""
        return self.budget or (Budget() if self.api_keys else GRAPH_ALONE)

    @property
    def upload_limits(self) -> RequestLimits:
        """The limits of bodies that go to the disk, and so take no memory while they come."""
        return replace(
            self.limits,
            body_bytes=self.storage.upload_bytes + _FORM_BYTES,
            body_s=self.storage.upload_s,
            all_bodies_bytes=sys.maxsize,
        )


BACKLOG = 4096  # the kernel cuts this to net.core.somaxconn
MOST_FILES = 1 << 20  # more connections than any machine serves
LEAST_FILES = 64  # with fewer files, the graph's processes cannot open their sockets
_SPARE_FILES = 48  # left for engines, logs and other files when the gateway has all connections


def bind(host: str, port: int) -> socket.socket:
    """Return a bound, non-blocking TCP socket, which does not listen yet. Raises OSError."""
    family, kind, protocol, _, address = socket.getaddrinfo(
        host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
    )[0]
    sock = socket.socket(family, kind, protocol)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)  # finds clients that vanished
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.bind(address)
    except OSError:
        sock.close()
        raise
    sock.setblocking(False)
    return sock


def url_of(sock: socket.socket, settings: Settings) -> str:
    """Return the URL of the gateway on a bound socket."""
    host, port = sock.getsockname()[:2]
    shown = f"[{host}]" if ":" in host else host
    return f"{'https' if settings.tls_key else 'http'}://{shown}:{port}"


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach a socket that is bound to `host`."""
    if host.lower() == "localhost":
        return True
    with suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return False


def max_connections() -> int:
    """The most connections that a gateway accepts; a few file descriptors are kept in reserve."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return max(8, min(soft, MOST_FILES) - _SPARE_FILES - _num_open_files())


def raise_open_files() -> None:
    """Raise the limit of open files to the system's hard limit. Child processes inherit it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MOST_FILES if hard == resource.RLIM_INFINITY else min(hard, MOST_FILES)
    if 0 <= soft < wanted:
        with suppress(OSError, ValueError):  # a sandbox may forbid it: serve with the present limit
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def num_files() -> int:
    """The limit of open files of this process."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return MOST_FILES if soft == resource.RLIM_INFINITY else soft


def _num_open_files() -> int:
    with suppress(OSError):
        return len(listdir("/proc/self/fd"))
    return 0


KEY_VARIABLE = "SAGELLM_API_KEY"
_ANY_HOST = {"0.0.0.0": "127.0.0.1", "[::]": "[::1]"}


def banner(url: str, models: Sequence[str], settings: Settings, *, has_chat: bool) -> str:
    """Return the start message of a server, with a curl command. The text contains no key."""
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
    """Return a shell command that asks the model for a short answer."""
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
    """Return the shell expression for the API key in KEY_VARIABLE, without a leading NAME=."""
    return f"${{{KEY_VARIABLE}#*=}}" if _is_named_key(settings) else f"${KEY_VARIABLE}"


def _is_key(settings: Settings) -> bool:
    """Whether KEY_VARIABLE holds a key of this server, alone or as NAME=KEY."""
    given = os.environ.get(KEY_VARIABLE, "")
    return given in settings.api_keys.values() or _is_named_key(settings)


def _is_named_key(settings: Settings) -> bool:
    """Whether KEY_VARIABLE holds a key of this server as NAME=KEY."""
    keys, given = settings.api_keys.values(), os.environ.get(KEY_VARIABLE, "")
    return given not in keys and given.partition("=")[2] in keys


def _reachable(url: str) -> str:
    """Return the URL for a client on this machine: a wildcard host becomes the loopback address."""
    scheme, _, rest = url.partition("://")
    host, _, port = rest.rpartition(":")
    return f"{scheme}://{_ANY_HOST.get(host, host)}:{port}"
