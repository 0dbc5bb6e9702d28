"""What one gateway is set up with: addresses, keys, limits; one frozen record."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal, TypeAlias

from msgspec import Meta

Count: TypeAlias = Annotated[int, Meta(ge=1)]
Bytes: TypeAlias = Annotated[int, Meta(ge=1, extra={"unit": "bytes"})]
Seconds: TypeAlias = Annotated[float, Meta(gt=0)]
Bound: TypeAlias = Annotated[int, Meta(ge=0)]
Rate: TypeAlias = Annotated[float, Meta(ge=0)]


@dataclass(frozen=True, slots=True)
class Limits:
    """What a request may be, before it is refused; sizes in bytes, times in seconds."""

    header_bytes: Annotated[int, Meta(ge=256, extra={"unit": "bytes"})] = 16 << 10
    """Size of the request line and all headers."""

    num_headers: Count = 100
    """Headers of one request."""

    header_s: Seconds = 10.0
    """Time until the headers are whole."""

    body_bytes: Bytes = 8 << 20
    """Size of a body."""

    all_bodies_bytes: Bytes = 256 << 20
    """Size of the bodies of all open calls of a process."""

    body_s: Seconds = 30.0
    """Time until the body is whole."""

    json_depth: Annotated[int, Meta(ge=4, le=512)] = 32
    """Levels of JSON inside each other."""

    num_prompts: Count = 1024
    """Prompts of one call."""

    num_messages: Count = 2048
    """Messages of one chat."""

    num_choices: Count = 16
    """`n`, the choices of each prompt."""

    num_stop: Count = 16
    """Stop strings."""

    stop_bytes: Bytes = 1024
    """Size of one stop string."""

    num_logit_bias: Count = 1024
    """Entries of `logit_bias`."""

    model_name_len: Count = 256
    """Characters of the name of a model."""


@dataclass(frozen=True, slots=True)
class Streaming:
    """How answers are sent."""

    keep_alive_s: Seconds = 5.0
    """Silence of a stream until a comment is sent."""

    num_buffered_tokens: Annotated[int, Meta(ge=4)] = 256
    """Tokens kept for a client that does not read."""

    num_buffered_bytes: Annotated[int, Meta(ge=1024, extra={"unit": "bytes"})] = 64 << 10
    """Size of the text kept for a client that does not read."""

    stall_s: Seconds = 30.0
    """Time after which a client that does not read is cut off."""


@dataclass(frozen=True, slots=True)
class Budget:
    """What one key may have under way at once, and cancel. 0: no bound."""

    num_open: Bound = 1024
    """Requests under way, streaming or waiting: each choice of each prompt is one; 0: no bound."""

    num_waiting: Bound = 1024
    """Requests under way without a first token; 0: no bound."""

    cancels_per_s: Rate = 100.0
    """Cancelled calls a second, after `num_open` at once; 0: no bound."""


# Without keys all clients share one budget: what one of them may not do, nobody may.
GRAPH_ALONE = Budget(num_open=0, num_waiting=0, cancels_per_s=0.0)


@dataclass(frozen=True, slots=True)
class Settings:
    """One gateway. `api_keys` maps a tenant's name to its key; empty: no key is asked for.

    `served_models`: the names that clients may use, the first of them in answers. `admin_key` opens
    the admin routes, which are closed to all where there is none. `salt_key` keys the prefix salts
    and the hashes in logs; drawn anew at each start unless given. Raises ValueError for half of a
    TLS setup, which would be served in the clear.

    `budgets` are those of tenants that have one of their own. `budget` is that of all others. None:
    `Budget()` where there are keys; else the graph's admission is all that bounds requests.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    server: Literal["hypercorn", "uvicorn"] = "hypercorn"
    num_gateways: int = 0  # processes that speak HTTP; 0: that of the graph does
    api_keys: dict[str, str] = field(default_factory=dict, repr=False)
    admin_key: str | None = field(default=None, repr=False)
    salt_key: bytes = field(default=b"", repr=False)
    served_models: tuple[str, ...] = ()
    allowed_hosts: tuple[str, ...] = ()  # beside the address that is served, and localhost
    allowed_origins: tuple[str, ...] = ()
    drain_s: float = 600.0  # open streams may take so long after SIGTERM
    linger_s: float = 0.0  # how long a drained listener stays, so that load balancers see the 503
    metrics_compat: tuple[str, ...] = ("vllm",)
    open_metrics: bool = False  # /metrics without a key
    otlp_endpoint: str | None = None  # of a collector that traces are sent to
    trace_sample: float = 0.01  # share of the requests that become traces
    page: bool = True  # the page at /, for a browser
    tls_certificate: Path | None = None
    tls_key: Path | None = None
    limits: Limits = Limits()
    streaming: Streaming = Streaming()
    budget: Budget | None = None
    budgets: dict[str, Budget] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if (self.tls_certificate is None) != (self.tls_key is None):
            raise ValueError("TLS needs both a certificate and its key")

    @property
    def common_budget(self) -> Budget:
        """Of each tenant that has none of its own."""
        return self.budget or (Budget() if self.api_keys else GRAPH_ALONE)
