"""`sagellm serve`: a graph, or one model, behind the OpenAI API."""

import gc

import trio

from sagellm.backends import LoweringError, UnknownBackend
from sagellm.cli.config_file import Config, read_config
from sagellm.cli.failure import CONFIGURATION, ENGINE_FIX, RESOURCES, Failure, warn
from sagellm.cli.loading import shown_start
from sagellm.cli.named import choose_graphs
from sagellm.cli.options import settings as assignments
from sagellm.cli.printed import printed
from sagellm.cli.secrets import exposed
from sagellm.cli.serving import (
    IN_A_FILE,
    ConfigOptions,
    GraphOptions,
    ListenOptions,
    ModelOptions,
    WatchOptions,
    check_installed,
    check_open_files,
    listening,
    logs_of,
    overrides,
    read_settings,
    served_names,
)
from sagellm.cli.setting import merge_given
from sagellm.decisions import Decisions
from sagellm.gateway.front import serve_graph
from sagellm.gateway.processes.supervision import GatewaysFailed
from sagellm.log_writer import write_line
from sagellm.runtime.engine.options import EngineOptionError


def serve(
    graph: str,
    /,
    *models: str,
    listen: ListenOptions = ListenOptions(),  # noqa: B008 - frozen
    served: ModelOptions = ModelOptions(),  # noqa: B008 - frozen
    opened: GraphOptions = GraphOptions(),  # noqa: B008 - frozen
    watch: WatchOptions = WatchOptions(),  # noqa: B008 - frozen
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
    file = read_config(config.config, IN_A_FILE) if config.config else Config()
    listen, served = merge_given(listen, file.values), merge_given(served, file.values)
    opened, watch = merge_given(opened, file.values), merge_given(watch, file.values)
    chosen, model = choose_graphs((graph, *models), opened.model, opened.import_)
    names = served_names(chosen, model, served)
    settings = read_settings(listen, names, watch, file, config.limit)
    check_installed(settings.server)
    for warning in exposed(file, (listen.tls_key, listen.admin_key_file, listen.salt_key_file)):
        warn(warning)
    changes = {**file.set, **assignments(opened.set_)}
    if config.print_config:
        print(printed((opened, listen, served, watch), settings, file, changes), end="")
        return 0
    check_open_files()
    opening = chosen.open(
        set=overrides(chosen, served) | changes, model=model, executor=opened.executor
    )
    with logs_of(watch, settings), listening(settings) as sock, shown_start() as progress:
        opening.report_to(progress)
        if opened.decisions is not None:
            opening.record_to(Decisions(opened.decisions, opened.decisions_bytes))
        try:
            trio.run(serve_graph, opening, settings, sock, _settled)
        except (UnknownBackend, LoweringError, EngineOptionError) as error:
            raise Failure(str(error), ENGINE_FIX, graph) from None
        except GatewaysFailed as error:
            code = RESOURCES if isinstance(error.__cause__, OSError) else CONFIGURATION
            fix = "see the log; --gateways 0 serves without"
            raise Failure(str(error), fix, graph, code) from None
    return 0


def _settled(text: str) -> None:
    """All is loaded: say where the gateway listens."""
    gc.collect()
    gc.freeze()  # what was loaded stays: to walk it all again would stall every stream for 50 ms
    tell(text)


def tell(text: str) -> None:
    """Print where the gateway listens."""
    write_line(f"{text}\n".encode())  # served all the same, where nobody can read that
