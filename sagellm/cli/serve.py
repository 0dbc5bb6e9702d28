"""`sagellm serve`: serves a graph, or models, over the OpenAI API."""

import errno
import gc
import socket
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path

import trio

from sagellm.builder import Graph
from sagellm.cli.config_file import ConfigFile, format_config, read_config
from sagellm.cli.errors import CONFIGURATION, RESOURCES, Failure, warn
from sagellm.cli.graph_argument import (
    choose_graphs,
    engine_failures,
    parse_assignments,
    public_model_name,
)
from sagellm.cli.keys import readable_secrets
from sagellm.cli.serve_options import (
    CONFIG_FILE_OPTIONS,
    ConfigOptions,
    GraphOptions,
    ListenOptions,
    ObservabilityOptions,
    ServedModelOptions,
    read_settings,
)
from sagellm.cli.setting import merge_given
from sagellm.cli.terminal import show_start_progress
from sagellm.gateway.batches.data_folder import FolderInUse, held_data_folder
from sagellm.gateway.lifecycle import serve_graph, server_class
from sagellm.gateway.processes.supervision import GatewaysFailed
from sagellm.gateway.settings import LEAST_FILES, Settings, bind, num_files, raise_open_files
from sagellm.graphs.ir import FrozenMap
from sagellm.graphs.sections import served_models
from sagellm.logs import LEVELS, process_logs
from sagellm.logs.lines import write_line
from sagellm.opening.decisions import DecisionFile
from sagellm.opening.open_graph import OpenGraph

_FOLDER_FIX = "name a folder that this user may write to, on a disk with hard links and file locks"


def serve(
    graph: str,
    /,
    *models: str,
    listen: ListenOptions = ListenOptions(),  # noqa: B008 - frozen
    served: ServedModelOptions = ServedModelOptions(),  # noqa: B008 - frozen
    graph_options: GraphOptions = GraphOptions(),  # noqa: B008 - frozen
    observability: ObservabilityOptions = ObservabilityOptions(),  # noqa: B008 - frozen
    config_options: ConfigOptions = ConfigOptions(),  # noqa: B008 - frozen
) -> int:
    """Serve a graph, or models, to OpenAI clients.

    SIGTERM, or Ctrl-C once, takes nothing new and lets what runs finish; twice ends it at once.

    Parameters
    ----------
    graph
        A graph file, the name of a shipped graph (pd, joint, pd_many), or a model: a built-in name,
        a folder, or a Hub id.
    models
        Further models, served beside the first; `model` in a request chooses.
    """
    path = config_options.config
    file = read_config(path, CONFIG_FILE_OPTIONS) if path else ConfigFile()
    listen, served = merge_given(listen, file.values), merge_given(served, file.values)
    graph_options = merge_given(graph_options, file.values)
    observability = merge_given(observability, file.values)
    chosen, model = choose_graphs((graph, *models), graph_options.model, graph_options.import_)
    names = served_names(chosen, model, served)
    settings = read_settings(listen, names, observability, file, config_options.limit)
    check_server_installed(settings.server)
    secrets = (listen.tls_key, listen.admin_key_file, listen.salt_key_file)
    for warning in readable_secrets(file, secrets):
        warn(warning)
    changes = {**file.set, **parse_assignments(graph_options.set_)}
    if config_options.print_config:
        options = (graph_options, listen, served, observability)
        print(format_config(options, settings, file, changes), end="")
        return 0
    check_open_files()
    opening = chosen.open(
        set=engine_overrides(chosen, served) | changes, model=model, executor=graph_options.executor
    )
    with engine_failures(graph), _gateway_failures(graph):
        _serve(opening, settings, graph_options, observability)
    return 0


def _serve(
    opening: OpenGraph,
    settings: Settings,
    graph_options: GraphOptions,
    observability: ObservabilityOptions,
) -> None:
    """Hold the data folder and the address, then open the graph and serve it until its end."""
    with (
        held_data_dir(settings.data_dir),
        server_logs(observability, settings),
        bound_socket(settings) as sock,
        show_start_progress() as progress,
    ):
        opening.report_to(progress)
        if graph_options.decisions is not None:
            opening.record_to(DecisionFile(graph_options.decisions, graph_options.decisions_bytes))
        trio.run(serve_graph, opening, settings, sock, _started)


@contextmanager
def _gateway_failures(graph: str) -> Iterator[None]:
    """Raise Failure if the block finds that gateway processes cannot serve `graph`."""
    try:
        yield
    except GatewaysFailed as error:
        # An OSError means that the machine could not start the processes.
        code = RESOURCES if isinstance(error.__cause__, OSError) else CONFIGURATION
        fix = "see the log; --gateways 0 serves without"
        raise Failure(str(error), fix, graph, code) from None


def _started(text: str) -> None:
    """Exclude loaded objects from garbage collection, and print the address of the gateway."""
    gc.collect()
    gc.freeze()  # a collection that visits all loaded objects would stall every stream for 50 ms
    print_address(text)


def print_address(text: str) -> None:
    """Print the address of the gateway to stderr. A closed stderr does not end the server."""
    write_line(f"{text}\n".encode())


def served_names(
    graph: Graph | OpenGraph, model: str | None, served: ServedModelOptions
) -> tuple[str, ...]:
    """The names that clients may use for the models. They never contain a path of this machine.

    `model`: the model that replaces the model of every engine, or None. Raises Failure.
    """
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


def engine_overrides(graph: Graph | OpenGraph, served: ServedModelOptions) -> dict[str, object]:
    """The engine options that `served` changes. Raises Failure for options without an effect."""
    if served.tensor_parallel_size != 1:
        cause = f"--tensor-parallel-size {served.tensor_parallel_size}: an engine has one device"
        raise Failure(cause, "leave it out; --set ENGINE.replicas=N runs N engines side by side")
    if served.gpu_memory_utilization is not None:
        cause = "--gpu-memory-utilization: no engine of this build has its blocks on a GPU"
        raise Failure(cause, "--set ENGINE.kv_memory=2GiB says how much the KV blocks may take")
    if served.max_model_len is None:
        return {}
    return {f"{engine}.max_model_len": served.max_model_len for engine in graph.ir.engines}


def server_logs(
    observability: ObservabilityOptions, settings: Settings
) -> AbstractContextManager[None]:
    """A context in which this process and its libraries log to stderr, without API keys."""
    known = (*settings.api_keys.values(), settings.admin_key or "")
    level, form = LEVELS[observability.log_level], observability.log_format
    return process_logs(level, key=settings.salt_key, known=known, form=form)


def check_server_installed(server: str) -> None:
    """Raise Failure if the package of the HTTP server `server` is not installed."""
    try:
        server_class(server)
    except ModuleNotFoundError as error:
        cause = f"--server {server} needs {error.name}, which is not installed"
        raise Failure(cause, f"pip install 'sagellm[{server}]'") from None


def check_open_files() -> None:
    """Increase this process's limit of open files. Raises Failure if it stays too low."""
    raise_open_files()
    if num_files() < LEAST_FILES:
        cause = f"{num_files()} open files are too few: a server needs {LEAST_FILES}, and more"
        raise Failure(cause, "raise the limit: ulimit -n 4096", code=RESOURCES)


@contextmanager
def held_data_dir(path: Path | None) -> Iterator[None]:
    """Make the folder of files and batches, and hold it for this server during the block.

    Has no effect without a path. Raises Failure if the folder cannot hold files and batches, or if
    another server holds it. Enter the block before weights load, so that this error comes at once.
    """
    with ExitStack() as stack:
        if path is not None:
            try:
                stack.enter_context(held_data_folder(path))
            except FolderInUse as error:
                cause = f"--data-dir is in use: the server of {error} works there"
                fix = "stop that server, or give this one a folder of its own"
                raise Failure(cause, fix, str(path), RESOURCES) from None
            except OSError as error:
                cause = f"--data-dir cannot be used: {error.strerror or 'it is no folder'}"
                raise Failure(cause, _FOLDER_FIX, str(path)) from None
        yield


@contextmanager
def bound_socket(settings: Settings) -> Iterator[socket.socket]:
    """A socket bound to the gateway's address; leaving the block closes it.

    Raises Failure if the address is not available. Enter the block before weights load, so that
    this error comes at once.
    """
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
