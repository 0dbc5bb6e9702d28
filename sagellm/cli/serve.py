"""`sagellm serve`: a graph, or one model, behind the OpenAI API."""

import gc

import trio

from sagellm.backends import LoweringError, UnknownBackend
from sagellm.cli.config_file import ConfigFile, format_config, read_config
from sagellm.cli.errors import CONFIGURATION, ENGINE_FIX, RESOURCES, Failure, warn
from sagellm.cli.graph_argument import choose_graphs
from sagellm.cli.keys import readable_secrets
from sagellm.cli.run_options import parse_assignments as assignments
from sagellm.cli.serve_options import (
    CONFIG_FILE_OPTIONS,
    ConfigOptions,
    GraphOptions,
    ListenOptions,
    ObservabilityOptions,
    ServedModelOptions,
    bound_socket,
    check_open_files,
    check_server_installed,
    engine_overrides,
    read_settings,
    served_names,
    server_logs,
)
from sagellm.cli.setting import merge_given
from sagellm.cli.terminal import show_start_progress
from sagellm.gateway.lifecycle import serve_graph
from sagellm.gateway.processes.supervision import GatewaysFailed
from sagellm.logs.lines import write_line
from sagellm.opening.decisions import DecisionFile
from sagellm.runtime.engine.options import EngineOptionError


def serve(
    graph: str,
    /,
    *models: str,
    listen: ListenOptions = ListenOptions(),  # noqa: B008 - frozen
    served: ServedModelOptions = ServedModelOptions(),  # noqa: B008 - frozen
    opened: GraphOptions = GraphOptions(),  # noqa: B008 - frozen
    watch: ObservabilityOptions = ObservabilityOptions(),  # noqa: B008 - frozen
    config: ConfigOptions = ConfigOptions(),  # noqa: B008 - frozen
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
    file = read_config(config.config, CONFIG_FILE_OPTIONS) if config.config else ConfigFile()
    listen, served = merge_given(listen, file.values), merge_given(served, file.values)
    opened, watch = merge_given(opened, file.values), merge_given(watch, file.values)
    chosen, model = choose_graphs((graph, *models), opened.model, opened.import_)
    names = served_names(chosen, model, served)
    settings = read_settings(listen, names, watch, file, config.limit)
    check_server_installed(settings.server)
    for warning in readable_secrets(
        file, (listen.tls_key, listen.admin_key_file, listen.salt_key_file)
    ):
        warn(warning)
    changes = {**file.set, **assignments(opened.set_)}
    if config.print_config:
        print(format_config((opened, listen, served, watch), settings, file, changes), end="")
        return 0
    check_open_files()
    opening = chosen.open(
        set=engine_overrides(chosen, served) | changes, model=model, executor=opened.executor
    )
    with (
        server_logs(watch, settings),
        bound_socket(settings) as sock,
        show_start_progress() as progress,
    ):
        opening.report_to(progress)
        if opened.decisions is not None:
            opening.record_to(DecisionFile(opened.decisions, opened.decisions_bytes))
        try:
            trio.run(serve_graph, opening, settings, sock, _started)
        except (UnknownBackend, LoweringError, EngineOptionError) as error:
            raise Failure(str(error), ENGINE_FIX, graph) from None
        except GatewaysFailed as error:
            code = RESOURCES if isinstance(error.__cause__, OSError) else CONFIGURATION
            fix = "see the log; --gateways 0 serves without"
            raise Failure(str(error), fix, graph, code) from None
    return 0


def _started(text: str) -> None:
    """All is loaded: say where the gateway listens."""
    gc.collect()
    gc.freeze()  # what was loaded stays: to walk it all again would stall every stream for 50 ms
    print_address(text)


def print_address(text: str) -> None:
    """Print where the gateway listens."""
    write_line(f"{text}\n".encode())  # served all the same, where nobody can read that
