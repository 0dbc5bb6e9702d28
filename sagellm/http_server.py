"""`sagellm.serve`: the OpenAI API for a graph built in Python, like `sagellm serve` for a file.

The options of `sagellm serve` are keyword arguments here, with `_` for `-`: `port=8000`,
`api_key="secret"`, `served_model_name=("a", "b")`, `gateways=2`.
"""

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import fields
from functools import partial
from typing import Any, TypeVar

import sniffio
import trio

from sagellm.builder import Graph
from sagellm.cli.errors import RESOURCES, Failure
from sagellm.cli.serve import (
    bound_socket,
    check_server_installed,
    engine_overrides,
    held_data_dir,
    print_address,
    served_names,
    server_logs,
)
from sagellm.cli.serve_options import (
    ListenOptions,
    LogLevel,
    ObservabilityOptions,
    ServedModelOptions,
    read_settings,
)
from sagellm.cli.setting import InvalidSetting, settings_of
from sagellm.gateway.lifecycle import serve_graph
from sagellm.gateway.settings import Settings, url_of
from sagellm.graphs.vocabulary import nearest
from sagellm.opening.open_graph import OpenGraph

T = TypeVar("T")
_KINDS = (ListenOptions, ServedModelOptions, ObservabilityOptions)
# Options of `graph.open`. Users often give them to `serve`; the error names the right place.
_OF_THE_GRAPH = ("set", "executor", "model", "seed")


def serve(graph: Graph | OpenGraph, *, log_level: LogLevel | None = "info", **options: Any) -> None:
    """Serve a graph until SIGTERM or Ctrl-C. The call blocks the thread.

    The first signal drains the server, the second ends it at once; outside the main thread signals
    have no effect. Prints the address on stderr. `log_level` None leaves logging unchanged. Raises
    TypeError and ValueError for wrong options, OSError for an address that is not available or a
    data folder that another server uses, GraphError for a wrong graph, and RuntimeError under trio
    or asyncio.
    """
    try:
        library = sniffio.current_async_library()
    except sniffio.AsyncLibraryNotFoundError:
        trio.run(partial(serve_async, graph, log_level=log_level, **options))
        return
    fix = "use `await graph.serve_async(...)`" if library == "trio" else "use a program of its own"
    raise RuntimeError(f"serve blocks, and would stop the event loop of {library}: {fix}")


async def serve_async(
    graph: Graph | OpenGraph,
    *,
    log_level: LogLevel | None = None,
    task_status: trio.TaskStatus[str] = trio.TASK_STATUS_IGNORED,
    **options: Any,
) -> None:
    """Serve a graph like `serve`, under trio: `url = await nursery.start(graph.serve_async)`.

    Cancellation ends the server at once. The program's own requests go over HTTP, too.
    """
    if sniffio.current_async_library() != "trio":  # the gateway runs under trio only
        raise RuntimeError("serve_async needs trio; a program of its own may call sagellm.serve")
    if not isinstance(graph, Graph | OpenGraph):
        raise TypeError(f"{graph!r:.80} is no graph: write sagellm.serve(Graph.load(...))")
    opening = graph.open() if isinstance(graph, Graph) else graph
    with _plain_errors():
        opening, settings = _prepared(opening, options)
        with (
            held_data_dir(settings.data_dir),
            _logs(log_level, options, settings),
            bound_socket(settings) as sock,
        ):

            def started(line: str) -> None:
                print_address(line)
                task_status.started(url_of(sock, settings))

            await serve_graph(opening, settings, sock, started)


def _prepared(opening: OpenGraph, options: Mapping[str, Any]) -> tuple[OpenGraph, Settings]:
    """Apply `options`: returns the changed graph and the gateway's settings.

    Raises TypeError, ValueError, Failure.
    """
    known = [
        option.name for kind in _KINDS for option in fields(kind) if option.name != "log_level"
    ]
    for name in options:
        if name not in known:
            close = nearest(name, known)
            if name in _OF_THE_GRAPH:
                raise TypeError(f"serve has no option {name!r}: use graph.open({name}=...).serve()")
            hint = f"did you mean {close!r}?" if close else f"there are {', '.join(known)}"
            raise TypeError(f"serve has no option {name!r}: {hint}")
    listen, served, watch = (_read(kind, options) for kind in _KINDS)
    assert isinstance(listen, ListenOptions)
    assert isinstance(served, ServedModelOptions)
    assert isinstance(watch, ObservabilityOptions)
    names = served_names(opening, opening.model, served)
    settings = read_settings(listen, names, watch)
    check_server_installed(settings.server)
    return opening.with_overrides(engine_overrides(opening, served)), settings


def _read(kind: type[T], options: Mapping[str, Any]) -> T:
    """The options that are fields of `kind`. A str is accepted for a list of one str.

    Raises ValueError.
    """
    known, given = settings_of(kind), {}
    for name in known.keys() & options.keys():
        try:
            given[name] = known[name].read(options[name])
        except InvalidSetting as error:
            raise ValueError(f"option {name} of serve {error}") from None
    return kind(**given)


def _logs(
    level: LogLevel | None, options: Mapping[str, Any], settings: Settings
) -> AbstractContextManager[None]:
    """A context that logs like the command line; without a level it changes nothing."""
    if level is None:  # a library must not change the logging of its application
        return nullcontext()
    watch = ObservabilityOptions(log_level=level, log_format=options.get("log_format"))
    return server_logs(watch, settings)


@contextmanager
def _plain_errors() -> Iterator[None]:
    """Turn a Failure into an OSError or ValueError whose message has its place, cause and fix."""
    try:
        yield
    except Failure as failure:
        parts = (failure.where, failure.cause, failure.fix)
        text = ": ".join(part for part in parts if part)
        raise (OSError if failure.code == RESOURCES else ValueError)(text) from None
