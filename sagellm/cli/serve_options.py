"""The options of `sagellm serve`, and what they mean: addresses, keys, names, the graph."""

import errno
import os
import socket
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from cyclopts import Parameter
from cyclopts.validators import Number

from sagellm.builder import Graph
from sagellm.cli.config_file import ConfigFile, read_limits
from sagellm.cli.errors import RESOURCES, Failure
from sagellm.cli.keys import admin_key, check_tls, salt_key, user_keys
from sagellm.cli.setting import GivenOptions
from sagellm.gateway.lifecycle import server_class
from sagellm.gateway.settings import (
    LEAST_FILES,
    Budget,
    RequestLimits,
    Settings,
    Streaming,
    bind,
    is_loopback,
    num_files,
    raise_open_files,
)
from sagellm.graphs.ir import FrozenMap
from sagellm.graphs.sections import served_models
from sagellm.logs import LEVELS, process_logs
from sagellm.opening.decisions import MAX_DECISION_BYTES
from sagellm.opening.open_graph import OpenGraph
from sagellm.several_models import public_model_name
from sagellm.tracing import TracingError, check_tracing

LogLevel = Literal["debug", "info", "warning", "error"]
S = TypeVar("S", RequestLimits, Streaming, Budget)
LogFormat = Literal["text", "json"]


@Parameter(name="*", group="Settings")
@dataclass(frozen=True, kw_only=True)
class ConfigOptions(GivenOptions):
    """Where options come from: the command line, then the file, then the environment."""

    config: Path | None = None
    """A TOML file of options, with keys, limits and changes of the graph."""

    print_config: bool = False
    """Print the settings as such a file, without keys, and end."""

    limit: tuple[str, ...] = ()
    """Change a limit, as body_bytes=16MiB; may be repeated. --print-config lists them all."""


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class GraphOptions(GivenOptions):
    """How the graph is opened."""

    model: str | None = None
    """The model of every engine of a graph."""

    executor: str | None = None
    """How the graph runs: tasks, in this process; or processes, a worker for each replica."""

    set_: Annotated[tuple[str, ...], Parameter(name="--set")] = ()
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
    """Loopback, without a key, unless told otherwise."""

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


@Parameter(name="*", group="What is served")
@dataclass(frozen=True, kw_only=True)
class ServedModelOptions(GivenOptions):
    """Spelled as vLLM spells them."""

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
    """Metrics are at /metrics."""

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


def server_logs(watch: ObservabilityOptions, settings: Settings) -> AbstractContextManager[None]:
    """All that this process logs, the libraries too; no line holds a key."""
    known = (*settings.api_keys.values(), settings.admin_key or "")
    level, form = LEVELS[watch.log_level], watch.log_format
    return process_logs(level, key=settings.salt_key, known=known, form=form)


def engine_overrides(graph: Graph | OpenGraph, served: ServedModelOptions) -> dict[str, object]:
    """What the options change in the graph. Raises Failure for those that nothing obeys."""
    if served.tensor_parallel_size != 1:
        cause = f"--tensor-parallel-size {served.tensor_parallel_size}: an engine has one device"
        raise Failure(cause, "leave it out; --set ENGINE.replicas=N runs N engines side by side")
    if served.gpu_memory_utilization is not None:
        cause = "--gpu-memory-utilization: no engine of this build has its blocks on a GPU"
        raise Failure(cause, "--set ENGINE.kv_memory=2GiB says how much the KV blocks may take")
    if served.max_model_len is None:
        return {}
    return {f"{engine}.max_model_len": served.max_model_len for engine in graph.ir.engines}


def served_names(
    graph: Graph | OpenGraph, model: str | None, served: ServedModelOptions
) -> tuple[str, ...]:
    """What clients may call the models: never a path of this machine."""
    if not all(served.served_model_name):
        raise Failure("--served-model-name is empty", "give it the name that clients use")
    models = served_models(graph.ir)
    if len(models) > 1 and served.served_model_name:
        cause = "--served-model-name names one model, and several are served"
        raise Failure(
            cause, "name them in a graph file: models: {KEY: {name: ..., aliases: [...]}}"
        )
    if served.served_model_name:
        return served.served_model_name
    if models[0].names:
        return tuple(name for each in models for name in each.names)
    first = next(iter(graph.ir.engines.values()), FrozenMap())
    known = model or str(first.get("model", "")) if isinstance(first, FrozenMap) else model
    return (public_model_name(known or "sage-tiny"),)


def read_settings(
    listen: ListenOptions,
    names: tuple[str, ...],
    watch: ObservabilityOptions = ObservabilityOptions(),
    config: ConfigFile = ConfigFile(),  # noqa: B008 - frozen
    limits: Sequence[str] = (),
) -> Settings:
    """Raises Failure for keys that are none, for an address that is open to all unasked, for TLS
    that cannot be served, for limits that there are not, for traces that cannot be sent, and for
    gateway processes where the system cannot watch them.
    """
    _check_tracing(watch)
    check_tls(listen.tls_certificate, listen.tls_key)
    keys = user_keys(listen.api_key, config)
    _check_listen(listen, has_keys=bool(keys))
    admin = admin_key(listen.admin_key, listen.admin_key_file)
    if len({*keys.values(), admin}) <= len(keys):
        raise Failure("one API key is given twice, or is the admin key too", "give each its own")
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
        metrics_compat=() if watch.metrics_compat == "none" else (watch.metrics_compat,),
        open_metrics=watch.open_metrics,
        otlp_endpoint=watch.otlp_endpoint,
        trace_sample=watch.trace_sample,
        tls_certificate=listen.tls_certificate,
        tls_key=listen.tls_key,
        limits=_changed(RequestLimits(), changed),
        streaming=_changed(Streaming(), changed),
        budget=budget,
        budgets={
            name: _changed(budget, key.budget)
            for name, key in config.keys.items()
            if name in keys and key.budget
        },
    )


def _check_listen(listen: ListenOptions, *, has_keys: bool) -> None:
    """Raises Failure for an address open to all unasked, and gateways that cannot be watched."""
    if listen.gateways and not hasattr(os, "pidfd_open"):
        cause = "gateway processes need Linux: they are watched by its means"
        raise Failure(cause, "leave --gateways away: the process of the graph speaks HTTP then")
    if not has_keys and not listen.insecure and not is_loopback(listen.host):
        cause = f"--host {listen.host} lets others in, and there is no API key"
        raise Failure(cause, "add --api-key KEY, or --insecure if everybody may use it")


def _changed(part: S, changed: Mapping[str, Any]) -> S:
    """The struct with those of the changes that are its own."""
    names = {field.name for field in fields(part)}
    return replace(part, **{name: changed[name] for name in names & changed.keys()})


def _check_tracing(watch: ObservabilityOptions) -> None:
    if watch.otlp_endpoint is None:
        if watch.trace_sample != ObservabilityOptions.trace_sample:
            cause = "--trace-sample is given, and there is nowhere to send traces"
            raise Failure(cause, "add --otlp-endpoint URL")
        return
    try:
        check_tracing(watch.otlp_endpoint, watch.trace_sample)
    except TracingError as error:
        raise Failure(str(error), "correct that option, or leave --otlp-endpoint out") from None


def check_server_installed(server: str) -> None:
    """Raise Failure for a server whose extra is missing."""
    try:
        server_class(server)
    except ModuleNotFoundError as error:
        cause = f"--server {server} needs {error.name}, which is not installed"
        raise Failure(cause, f"pip install 'sagellm[{server}]'") from None


def check_open_files() -> None:
    """Raise Failure where so few files may be open that the server could not start, or not work."""
    raise_open_files()
    if num_files() < LEAST_FILES:
        cause = f"{num_files()} open files are too few: a server needs {LEAST_FILES}, and more"
        raise Failure(cause, "raise the limit: ulimit -n 4096", code=RESOURCES)


@contextmanager
def bound_socket(settings: Settings) -> Iterator[socket.socket]:
    """The bound socket, before any weight is loaded. Raises Failure where it cannot be had."""
    try:
        sock = bind(settings.host, settings.port)
    except OSError as error:
        raise _cannot_listen(error, settings) from None
    with sock:
        yield sock


def _cannot_listen(error: OSError, settings: Settings) -> Failure:
    where = f"{settings.host}:{settings.port}"
    if error.errno == errno.EADDRINUSE:
        fix = "stop what listens there, or choose --port"
        return Failure("the port is in use", fix, where, RESOURCES)
    if error.errno == errno.EACCES:
        return Failure("the port needs privileges", "choose a --port above 1023", where)
    return Failure("this machine has no such address", "choose another --host", where)
