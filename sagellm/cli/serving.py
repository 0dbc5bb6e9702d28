"""The options of `sagellm serve`, and what they mean: addresses, keys, names, the graph."""

import errno
import os
import re
import socket
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter
from cyclopts.validators import Number

from sagellm.builder import Graph, shipped
from sagellm.cli.failure import RESOURCES, Failure
from sagellm.cli.named import load_graph, no_graph, shipped_names
from sagellm.gateway.server.front import server_class
from sagellm.gateway.server.listen import bind, is_loopback
from sagellm.gateway.settings import Settings
from sagellm.graphs.ir import FrozenMap
from sagellm.graphs.vocabulary import nearest
from sagellm.logs import LEVELS, own_logs
from sagellm.runtime.models.folder import BUILT_IN
from sagellm.tracing import TracingError, check_tracing

DEFAULT_GRAPH = "joint"
NULL = "null"  # a model without weights, for device null
API_KEY, ADMIN_KEY = "SAGELLM_API_KEY", "SAGELLM_ADMIN_KEY"
LogLevel = Literal["debug", "info", "warning", "error"]
LogFormat = Literal["text", "json"]

_NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")
_OWN_NAMES = frozenset({"admin", "anonymous", "probe"})


@Parameter(name="*", group="Who may reach it")
@dataclass(frozen=True, kw_only=True)
class ListenOptions:
    """Loopback, without a key, unless told otherwise."""

    host: str = "127.0.0.1"
    """The address to listen at; anything but loopback needs an API key."""

    port: Annotated[int, Parameter(validator=Number(gte=0, lte=65535))] = 8000
    """0 chooses a free one."""

    api_key: tuple[str, ...] = ()
    """KEY, or NAME=KEY for a tenant of that name; may be repeated. Also SAGELLM_API_KEY."""

    admin_key: str | None = None
    """Opens the admin routes, which are closed without one. Also SAGELLM_ADMIN_KEY."""

    allowed_host: tuple[str, ...] = ()
    """A further name that clients reach this server under; may be repeated; * for any."""

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


@Parameter(name="*", group="What is served")
@dataclass(frozen=True, kw_only=True)
class ModelOptions:
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
class WatchOptions:
    """Metrics are at /metrics."""

    log_level: LogLevel = "info"
    """What is logged to stderr; the text of exceptions only at debug."""

    log_format: LogFormat | None = None
    """text or json [default: text where stderr is a terminal, else JSON lines]."""

    open_metrics: bool = False
    """Answer /metrics without a key."""

    otlp_endpoint: str | None = None
    """An OpenTelemetry collector, such as http://localhost:4318, that traces are sent to."""

    trace_sample: float = 0.01
    """The share of requests that become traces; errors and slow ones always do."""


def logs_of(watch: WatchOptions, settings: Settings) -> AbstractContextManager[None]:
    """All that this process logs, the libraries too; no line holds a key."""
    known = (*settings.api_keys.values(), settings.admin_key or "")
    level, form = LEVELS[watch.log_level], watch.log_format
    return own_logs(level, key=settings.salt_key, known=known, form=form)


def choose_graph(name: str, model: str | None) -> tuple[Graph, str | None]:
    """The graph, and the model of its engines where one is chosen. Raises Failure, GraphError."""
    if shipped(name).is_file():
        return load_graph(name), model
    if Path(name).suffix in (".yaml", ".yml"):
        raise no_graph(name)
    if model is not None:
        cause = f"{name} is no graph, and --model names the model of a graph"
        raise Failure(cause, "give one of them, or a graph file and --model")
    _check_model_name(name)
    return load_graph(DEFAULT_GRAPH), name


def _check_model_name(name: str) -> None:
    """Raise Failure for a plain word that is neither built in nor a folder: a slip, as a rule."""
    if "/" in name or name in (*BUILT_IN, NULL) or Path(name).exists():
        return
    graphs, models = shipped_names(), tuple(BUILT_IN)
    close = nearest(name, (*graphs, *models))
    listed = f"graphs: {', '.join(graphs)}, a file; models: {', '.join(models)}, a folder, a Hub id"
    fix = f"did you mean {close}?" if close else listed
    raise Failure("there is no graph and no model of that name", fix, name)


def overrides(graph: Graph, served: ModelOptions) -> dict[str, object]:
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


def served_names(graph: Graph, model: str | None, served: ModelOptions) -> tuple[str, ...]:
    """What clients may call the model: never a path of this machine."""
    if served.served_model_name:
        return served.served_model_name
    first = next(iter(graph.ir.engines.values()), FrozenMap())
    known = model or str(first.get("model", "")) if isinstance(first, FrozenMap) else model
    name = known or "sage-tiny"
    return (Path(name).resolve().name if Path(name).exists() else name,)


def read_settings(
    listen: ListenOptions, names: tuple[str, ...], watch: WatchOptions = WatchOptions()
) -> Settings:
    """Raises Failure for keys that are none, for an address that is open to all unasked, and for
    traces that cannot be sent.
    """
    _check_tracing(watch)
    given = listen.api_key or _from_environment(API_KEY)
    keys = read_keys(given)
    if not keys and not listen.insecure and not is_loopback(listen.host):
        cause = f"--host {listen.host} lets others in, and there is no API key"
        raise Failure(cause, "add --api-key KEY, or --insecure if everybody may use it")
    admin_key = listen.admin_key or next(iter(_from_environment(ADMIN_KEY)), None)
    if len({*keys.values(), admin_key}) <= len(keys):
        raise Failure("one API key is given twice, or is the admin key too", "give each its own")
    return Settings(
        host=listen.host,
        port=listen.port,
        server=listen.server,
        num_gateways=listen.gateways,
        api_keys=keys,
        admin_key=admin_key,
        served_models=names,
        allowed_hosts=listen.allowed_host,
        drain_s=listen.drain_s,
        linger_s=listen.linger_s,
        open_metrics=watch.open_metrics,
        otlp_endpoint=watch.otlp_endpoint,
        trace_sample=watch.trace_sample,
    )


def _check_tracing(watch: WatchOptions) -> None:
    if watch.otlp_endpoint is None:
        if watch.trace_sample != WatchOptions.trace_sample:
            cause = "--trace-sample is given, and there is nowhere to send traces"
            raise Failure(cause, "add --otlp-endpoint URL")
        return
    try:
        check_tracing(watch.otlp_endpoint, watch.trace_sample)
    except TracingError as error:
        raise Failure(str(error), "mend it, or leave tracing out") from None


def read_keys(given: Sequence[str]) -> dict[str, str]:
    """KEY or NAME=KEY as name -> key; a key without a name gets a number. Raises Failure."""
    keys: dict[str, str] = {}
    for number, text in enumerate(given, 1):
        name, _, key = text.partition("=")
        if not key.strip("="):  # base64 ends in "="
            name, key = f"key-{number}", text
        if not key or not key.isprintable() or " " in key:
            raise Failure("an API key is empty or has blanks", "give --api-key KEY or NAME=KEY")
        if not _NAME.fullmatch(name) or name in _OWN_NAMES or name in keys:
            fix = "letters, digits, . _ - ; each name once; not admin, anonymous or probe"
            raise Failure("the name of an API key cannot be taken", fix, "--api-key NAME=KEY")
        keys[name] = key
    return keys


def _from_environment(name: str) -> tuple[str, ...]:
    value = os.environ.get(name, "")
    return (value,) if value else ()


def check_installed(server: str) -> None:
    """Raise Failure for a server whose extra is missing."""
    try:
        server_class(server)
    except ModuleNotFoundError as error:
        cause = f"--server {server} needs {error.name}, which is not installed"
        raise Failure(cause, f"pip install 'sagellm[{server}]'") from None


@contextmanager
def listening(settings: Settings) -> Iterator[socket.socket]:
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
