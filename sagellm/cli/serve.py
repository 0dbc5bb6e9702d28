"""`sagellm serve`: a graph, or one model, behind the OpenAI API."""

import gc
from typing import Annotated

import trio
from cyclopts import Parameter

from sagellm.backends import LoweringError, UnknownBackend
from sagellm.cli.failure import Failure
from sagellm.cli.loading import shown_start
from sagellm.cli.options import settings as assignments
from sagellm.cli.serving import (
    ListenOptions,
    ModelOptions,
    WatchOptions,
    check_installed,
    choose_graph,
    listening,
    logs_of,
    overrides,
    read_settings,
    served_names,
)
from sagellm.gateway.processes.supervision import GatewaysFailed
from sagellm.gateway.server.front import serve_graph
from sagellm.log_writer import write_line
from sagellm.runtime.engine.options import EngineOptionError


def serve(
    graph: str,
    /,
    *,
    listen: ListenOptions = ListenOptions(),  # noqa: B008 - frozen
    served: ModelOptions = ModelOptions(),  # noqa: B008 - frozen
    model: str | None = None,
    executor: str | None = None,
    set_: Annotated[tuple[str, ...], Parameter(name="--set")] = (),
    watch: WatchOptions = WatchOptions(),  # noqa: B008 - frozen
) -> int:
    """Serve a graph, or one model, to OpenAI clients.

    SIGTERM, or Ctrl-C once, takes nothing new and lets what runs finish; twice ends it at once.

    Parameters
    ----------
    graph
        A graph file, the name of a shipped graph (pd, joint, pd_many), or a model: a built-in name,
        a folder, or a Hub id.
    model
        The model of every engine of a graph.
    executor
        How the graph runs: tasks, in this process; or processes, a worker for each engine replica.
    set_
        Change an option of the graph, as op.key=value; may be repeated.
    """
    chosen, model = choose_graph(graph, model)
    names = served_names(chosen, model, served)
    settings = read_settings(listen, names, watch)
    check_installed(settings.server)
    opening = chosen.open(
        set=overrides(chosen, served) | assignments(set_), model=model, executor=executor
    )
    with logs_of(watch, settings), listening(settings) as sock, shown_start() as progress:
        opening.report_to(progress)
        try:
            trio.run(serve_graph, opening, settings, sock, _tell)
        except (UnknownBackend, LoweringError, EngineOptionError) as error:
            raise Failure(str(error), "mend the engines of the graph", graph) from None
        except GatewaysFailed as error:
            raise Failure(str(error), "see the log; --gateways 0 serves without", graph) from None
    return 0


def _tell(text: str) -> None:
    gc.collect()
    gc.freeze()  # what was loaded stays: to walk it all again would stall every stream for 50 ms
    write_line(f"{text}\n".encode())  # served all the same, where nobody can read that
