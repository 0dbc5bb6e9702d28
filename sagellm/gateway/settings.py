"""What one gateway is set up with: addresses, keys, limits; one frozen record."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal


@dataclass(frozen=True, slots=True)
class Limits:
    """What a request may be, before it is refused; sizes in bytes, times in seconds."""

    header_bytes: int = 16 << 10
    num_headers: int = 100
    header_s: float = 10.0  # until the headers are whole
    body_bytes: int = 8 << 20
    body_s: float = 30.0  # until the body is whole
    json_depth: int = 32
    num_prompts: int = 128
    num_messages: int = 2048
    num_choices: int = 16
    num_stop: int = 16
    stop_bytes: int = 1024  # of one stop string
    num_logit_bias: int = 1024
    model_name_len: int = 256


@dataclass(frozen=True, slots=True)
class Streaming:
    """How answers are sent."""

    keep_alive_s: float = 5.0  # a comment after so long without an event
    num_buffered_tokens: int = 256  # of a client that does not read
    num_buffered_bytes: int = 64 << 10
    stall_s: float = 30.0  # after which a client that does not read is ended


@dataclass(frozen=True, slots=True)
class Budget:
    """What one key may have under way at once."""

    num_open: int = 256  # requests, streaming or waiting
    num_waiting: int = 128  # of them, those without a first token
    cancels_per_s: float = 100.0


@dataclass(frozen=True, slots=True)
class Settings:
    """One gateway. `api_keys` maps a tenant's name to its key; empty: no key is asked for.

    `served_models`: the names that clients may use, the first of them in answers. `admin_key` opens
    the admin routes, which are closed to all where there is none. `salt_key` keys the prefix salts
    and the hashes in logs; drawn anew at each start unless given. Raises ValueError for half of a
    TLS setup, which would be served in the clear.
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
    budget: Budget = Budget()

    def __post_init__(self) -> None:
        if (self.tls_certificate is None) != (self.tls_key is None):
            raise ValueError("TLS needs both a certificate and its key")
