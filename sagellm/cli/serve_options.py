"""The options of `sagellm serve`, and their conversion to the gateway's settings."""

import os
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from cyclopts import Parameter
from cyclopts.validators import Number

from sagellm.cli.config_file import ConfigFile
from sagellm.cli.errors import Failure, suggestion
from sagellm.cli.graph_argument import Assignments
from sagellm.cli.keys import admin_key, check_tls, salt_key, user_keys
from sagellm.cli.setting import LIMITS, GivenOptions, InvalidSetting
from sagellm.gateway.settings import (
    Budget,
    RequestLimits,
    Settings,
    StorageLimits,
    Streaming,
    is_loopback,
)
from sagellm.opening.decisions import MAX_DECISION_BYTES
from sagellm.tracing import TracingError, check_tracing

LogLevel = Literal["debug", "info", "warning", "error"]
LogFormat = Literal["text", "json"]
S = TypeVar("S", RequestLimits, Streaming, StorageLimits, Budget)


@Parameter(name="*", group="Settings")
@dataclass(frozen=True, kw_only=True)
class ConfigOptions(GivenOptions):
    """The sources of settings: the command line wins over the file, the file over the variables."""

    config: Path | None = None
    """A TOML file of options, with keys, limits and changes of the graph."""

    print_config: bool = False
    """Print the settings as such a file, without keys, and end."""

    limit: tuple[str, ...] = ()
    """Change a limit, as body_bytes=16MiB; may be repeated. --print-config lists them all."""


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class GraphOptions(GivenOptions):
    """The options for opening the graph."""

    model: str | None = None
    """The model of every engine of a graph."""

    executor: str | None = None
    """How the graph runs: tasks, in this process; or processes, a worker for each replica."""

    set_: Assignments = ()
    """Change an option of the graph, as op.key=value; may be repeated."""

    import_: Annotated[tuple[str, ...], Parameter(name="--import")] = ()
    """A dotted module or a .py file that registers what the graph uses; may be repeated."""

    decisions: Path | None = None
    """A file for a log of what is decided, which `sagellm replay` reads; it holds the prompts."""

    decisions_bytes: Annotated[int, Parameter(validator=Number(gte=1))] = MAX_DECISION_BYTES
    """How large that log may become; nothing is logged after that."""


@Parameter(name="*", group="Who may reach it")
@dataclass(frozen=True, kw_only=True)
class ListenOptions(GivenOptions):
    """The address, the keys and the servers. The default is loopback without a key."""

    host: str = "127.0.0.1"
    """The address to listen at; anything but loopback needs an API key."""

    port: Annotated[int, Parameter(validator=Number(gte=0, lte=65535))] = 8000
    """0 chooses a free one."""

    api_key: tuple[str, ...] = ()
    """KEY, or NAME=KEY for a tenant of that name; may be repeated. Also SAGELLM_API_KEY."""

    admin_key: str | None = None
    """Opens the admin routes, which are closed without one. Also SAGELLM_ADMIN_KEY."""

    admin_key_file: Path | None = None
    """A file that holds the admin key."""

    salt_key_file: Path | None = None
    """A file with a secret: prefix salts and hashes in logs derive from it and survive restarts."""

    allowed_host: tuple[str, ...] = ()
    """A further name that clients reach this server under; may be repeated; * for any."""

    allowed_origin: tuple[str, ...] = ()
    """A further origin whose pages may send requests, as https://app.example; may be repeated."""

    tls_certificate: Path | None = None
    """A PEM file with the certificate, and the chain, that HTTPS is served with."""

    tls_key: Path | None = None
    """A PEM file with the key of the certificate, without a passphrase."""

    insecure: bool = False
    """Let everybody in who can reach the address."""

    server: Literal["hypercorn", "uvicorn"] = "hypercorn"
    """uvicorn needs the extra sagellm[uvicorn], and takes less time an event."""

    gateways: Annotated[int, Parameter(validator=Number(gte=0, lte=64))] = 0
    """Processes that speak HTTP for the graph; with 0 its own does."""

    drain_s: Annotated[float, Parameter(validator=Number(gte=0))] = 600.0
    """How long open streams may go on after SIGTERM, in seconds."""

    linger_s: Annotated[float, Parameter(validator=Number(gte=0))] = 0.0
    """How long a drained server still refuses, so that load balancers notice, in seconds."""

    page: Annotated[bool, Parameter(name="--page", negative="--no-page")] = True
    """Serve the chat page at /, for a browser."""

    data_dir: Path | None = None
    """A folder that keeps uploaded files and batches; without it their endpoints are closed."""


@Parameter(name="*", group="What is served")
@dataclass(frozen=True, kw_only=True)
class ServedModelOptions(GivenOptions):
    """The served models. The options have vLLM's names."""

    served_model_name: tuple[str, ...] = ()
    """What clients call the model; may be repeated, the first is in answers."""

    max_model_len: Annotated[int | None, Parameter(validator=Number(gte=2))] = None
    """The most tokens that a prompt and its answer have together."""

    tensor_parallel_size: int = 1
    """Only 1: an engine runs on one device."""

    gpu_memory_utilization: float | None = None
    """Not taken: give an engine kv_memory or num_blocks by --set."""


@Parameter(name="*", group="What can be seen of it")
@dataclass(frozen=True, kw_only=True)
class ObservabilityOptions(GivenOptions):
    """Logs, metrics and traces."""

    log_level: LogLevel = "info"
    """What is logged to stderr; texts of exceptions only at debug, but for your own code's."""

    log_format: LogFormat | None = None
    """text or json [default: text where stderr is a terminal, else JSON lines]."""

    open_metrics: bool = False
    """Answer /metrics without a key."""

    metrics_compat: Literal["vllm", "none"] = "vllm"
    """Whose names of metrics there are beside our own."""

    otlp_endpoint: str | None = None
    """An OpenTelemetry collector, such as http://localhost:4318, that traces are sent to."""

    trace_sample: float = 0.01
    """The share of requests that become traces; errors and slow ones always do."""


CONFIG_FILE_OPTIONS = (GraphOptions, ListenOptions, ServedModelOptions, ObservabilityOptions)


def read_settings(
    listen: ListenOptions,
    names: tuple[str, ...],
    observability: ObservabilityOptions = ObservabilityOptions(),
    config: ConfigFile = ConfigFile(),  # noqa: B008 - frozen
    limits: Sequence[str] = (),
) -> Settings:
    """The gateway's settings. `names`: the served models; `limits`: texts NAME=VALUE of `--limit`.

    Raises Failure for invalid or repeated keys, an address that others can reach without a key, an
    unusable certificate, an unknown limit, a wrong tracing endpoint, and gateway processes on a
    system other than Linux.
    """
    _check_tracing(observability)
    check_tls(listen.tls_certificate, listen.tls_key)
    keys, admin = _read_keys(listen, config)
    compat = observability.metrics_compat
    changed = {**config.limits, **read_limits(limits)}
    budget = _changed(Settings(api_keys=keys).common_budget, changed)
    return Settings(
        host=listen.host,
        port=listen.port,
        server=listen.server,
        num_gateways=listen.gateways,
        api_keys=keys,
        admin_key=admin,
        salt_key=salt_key(listen.salt_key_file),
        served_models=names,
        allowed_hosts=listen.allowed_host,
        allowed_origins=listen.allowed_origin,
        drain_s=listen.drain_s,
        linger_s=listen.linger_s,
        page=listen.page,
        metrics_compat=() if compat == "none" else (compat,),
        open_metrics=observability.open_metrics,
        otlp_endpoint=observability.otlp_endpoint,
        trace_sample=observability.trace_sample,
        tls_certificate=listen.tls_certificate,
        tls_key=listen.tls_key,
        data_dir=listen.data_dir and listen.data_dir.absolute(),
        limits=_changed(RequestLimits(), changed),
        streaming=_changed(Streaming(), changed),
        storage=_changed(StorageLimits(), changed),
        budget=budget,
        budgets=_own_budgets(budget, keys, config),
    )


def _read_keys(listen: ListenOptions, config: ConfigFile) -> tuple[dict[str, str], str | None]:
    """Return the keys by tenant, and the admin key. Raises Failure for repeated or missing keys."""
    keys = user_keys(listen.api_key, config)
    _check_listen(listen, has_keys=bool(keys))
    admin = admin_key(listen.admin_key, listen.admin_key_file)
    if len({*keys.values(), admin}) <= len(keys):  # a tenant with the admin key would be admin
        raise Failure("one API key is given twice, or is the admin key too", "give each its own")
    return keys, admin


def _own_budgets(common: Budget, keys: Container[str], config: ConfigFile) -> dict[str, Budget]:
    """Return the budgets of the tenants that have one of their own. `keys`: the known tenants."""
    return {
        name: _changed(common, key.budget)
        for name, key in config.keys.items()
        if name in keys and key.budget  # --api-key replaces all keys of the file
    }


def _check_listen(listen: ListenOptions, *, has_keys: bool) -> None:
    """Raise Failure for an address that others can reach without a key, and for gateway processes
    on a system other than Linux.
    """
    if listen.gateways and not hasattr(os, "pidfd_open"):
        cause = "gateway processes need Linux: they are watched by its means"
        raise Failure(cause, "leave --gateways away: the process of the graph speaks HTTP then")
    if not has_keys and not listen.insecure and not is_loopback(listen.host):
        cause = f"--host {listen.host} lets others in, and there is no API key"
        raise Failure(cause, "add --api-key KEY, or --insecure if everybody may use it")


def _changed(part: S, changed: Mapping[str, Any]) -> S:
    """A copy of `part`, with the entries of `changed` that are fields of `part`."""
    names = {field.name for field in fields(part)}
    return replace(part, **{name: changed[name] for name in names & changed.keys()})


def _check_tracing(observability: ObservabilityOptions) -> None:
    if observability.otlp_endpoint is None:
        if observability.trace_sample != ObservabilityOptions.trace_sample:
            cause = "--trace-sample is given, and there is nowhere to send traces"
            raise Failure(cause, "add --otlp-endpoint URL")
        return
    try:
        check_tracing(observability.otlp_endpoint, observability.trace_sample)
    except TracingError as error:
        raise Failure(str(error), "correct that option, or leave --otlp-endpoint out") from None


def read_limits(given: Sequence[str]) -> dict[str, Any]:
    """Parse texts NAME=VALUE of `--limit` into name -> value. Raises Failure."""
    found: dict[str, Any] = {}
    for text in given:
        name, equals, value = text.partition("=")
        name, where = name.strip().replace("-", "_"), f"--limit {text}"
        if not equals:
            raise Failure("a limit needs a value", "for example --limit body_bytes=16MiB", where)
        if name not in LIMITS:
            raise Failure(f"there is no limit {name!r}", suggestion(name, LIMITS), where)
        try:
            found[name] = LIMITS[name].read(_number(value.strip()))
        except InvalidSetting as error:
            raise Failure(f"{name} {error}", LIMITS[name].doc, where) from None
    return found


def _number(text: str) -> object:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text
