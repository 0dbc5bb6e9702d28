"""Opening a graph: check it, load its engines, build its operators, run its executor."""

import importlib
import math
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import (
    AbstractAsyncContextManager,
    AsyncExitStack,
    asynccontextmanager,
    contextmanager,
)
from copy import copy
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, TypeAlias

import sniffio
import trio

from sagellm.backends.interface import Progress, silent
from sagellm.errors import UsageError, misused, refuse_in_loop, unopened
from sagellm.graphs.ir import Graph
from sagellm.graphs.text.yaml import Document
from sagellm.opening.bridge import AsyncioSession, BlockingSession, Bridge
from sagellm.opening.checking import checked_graph, log_warnings
from sagellm.opening.decisions import DecisionFile, recording
from sagellm.opening.graph_engines import open_engines
from sagellm.runtime.cluster.executor_options import IPC, ProcessesOptions, processes_options
from sagellm.runtime.executors.tasks import TasksExecutor
from sagellm.runtime.plan import plan
from sagellm.runtime.port import Engine
from sagellm.runtime.resolver import Resolver
from sagellm.session import RequestFailed, Session
from sagellm.session.models import Models, load_models

_SERVING = "sagellm.http_server"  # whose packages nobody needs who does not serve
HOW_TO_OPEN = (
    "`async with graph.open() as session` under trio or asyncio, "
    "`with graph.open() as session` elsewhere"
)
_WORKERS = "sagellm.opening.worker_processes"  # whose import takes a tenth of a second that others do without

if TYPE_CHECKING:
    from sagellm.runtime.cluster.launch import ProcessLauncher
    from sagellm.runtime.cluster.supervisor import Supervisor

LaunchProcesses: TypeAlias = "Callable[[ProcessesOptions], ProcessLauncher]"


@dataclass(frozen=True, slots=True)
class GraphOpening:
    """All that it takes to open one graph."""

    document: Document
    resolver: Resolver
    functions: Mapping[str, Callable[..., Any]]
    overrides: Mapping[str, Any]
    model: str | None
    seed: int
    launch: "LaunchProcesses | None" = None  # how worker processes are started
    progress: Progress = silent  # called with each event of the start
    decisions: DecisionFile | None = None  # where they are written


@misused(__await__=f"a graph is not awaited: {HOW_TO_OPEN}")
@unopened(HOW_TO_OPEN)
class OpenGraph:
    """A graph about to be opened: `async with` under trio or asyncio, `with` in a plain thread.

    Leaving it ends what still runs, frees every block and stops every engine. Entering raises
    GraphError before any model is loaded, ModelError where one cannot be, and UsageError where it
    is open already, or `with` would block a loop.
    """

    def __init__(
        self,
        document: Document,
        *,
        resolver: Resolver,
        functions: Mapping[str, Callable[..., Any]],
        overrides: Mapping[str, Any],
        model: str | None,
        seed: int,
    ) -> None:
        self._recipe = GraphOpening(document, resolver, functions, overrides, model, seed)
        self._opened: AbstractAsyncContextManager[Session] | None = None
        self._bridge: Bridge | None = None
        self._is_entered = False

    @property
    def ir(self) -> Graph:
        """The frozen graph, before overrides."""
        return self._recipe.document.graph

    @property
    def model(self) -> str | None:
        """What replaces the model of every engine, if anything does."""
        return self._recipe.model

    def with_overrides(self, more: Mapping[str, Any]) -> "OpenGraph":
        """The same graph with further options set, not opened yet."""
        recipe = self._recipe
        other = copy(self)
        other._left()
        other._recipe = replace(recipe, overrides={**recipe.overrides, **more})
        return other

    def serve(self, **options: Any) -> None:
        """Serve it over HTTP until SIGTERM or Ctrl-C; see `sagellm.serve`."""
        importlib.import_module(_SERVING).serve(self, **options)

    async def serve_async(self, **options: Any) -> None:
        """The same under trio; see `sagellm.http_server.serve_async`."""
        await importlib.import_module(_SERVING).serve_async(self, **options)

    def launch_by(self, launch: "LaunchProcesses") -> None:
        """Start worker processes, if there are any, by that instead."""
        self._recipe = replace(self._recipe, launch=launch)

    def record_to(self, decisions: DecisionFile) -> None:
        """Write a log of the graph's decisions: see `docs/operations.md`."""
        self._recipe = replace(self._recipe, decisions=decisions)

    def report_to(self, progress: Progress) -> None:
        """Call it, from any thread, with how far the start is: see `backends/interface.py`."""
        self._recipe = replace(self._recipe, progress=progress)

    async def __aenter__(self) -> Any:  # Session under trio, AsyncioSession under asyncio
        with self._entering():
            if sniffio.current_async_library() == "trio":
                self._opened = open_session(self._recipe)
                return await self._opened.__aenter__()
            self._bridge = Bridge(lambda: open_session(self._recipe))
            session: AsyncioSession = await self._bridge.open_asyncio()
            return session

    async def __aexit__(self, *error: Any) -> bool | None:
        opened, bridge = self._left()
        if opened is not None:
            return await opened.__aexit__(*error)
        if bridge is not None:
            await bridge.close_asyncio()
        return None

    def __enter__(self) -> BlockingSession:
        refuse_in_loop("`with graph.open()`", "`async with graph.open()`")
        with self._entering():
            self._bridge = Bridge(lambda: open_session(self._recipe))
            return self._bridge.open_blocking()

    def __exit__(self, *error: Any) -> None:
        _, bridge = self._left()
        if bridge is not None:
            bridge.close_blocking()

    def _left(self) -> tuple[AbstractAsyncContextManager[Session] | None, Bridge | None]:
        """What it was entered by. It is closed now, and may be entered again in another way."""
        opened, bridge = self._opened, self._bridge
        self._opened, self._bridge, self._is_entered = None, None, False
        return opened, bridge

    @contextmanager
    def _entering(self) -> Iterator[None]:
        """Raises UsageError where it is open; what cannot be opened may be tried again."""
        if self._is_entered:
            raise UsageError("this graph is open already; graph.open() again opens a second one")
        self._is_entered = True
        try:
            yield
        except BaseException:
            self._is_entered = False
            raise


@asynccontextmanager
async def open_session(recipe: GraphOpening) -> AsyncIterator[Session]:
    """Run the graph in a nursery of its own for as long as the session is open."""
    found = checked_graph(
        recipe.document, recipe.resolver, recipe.functions, recipe.overrides, recipe.model
    )
    links = processes_options(found.graph)
    # Workers that come over tcp may be on other machines, and look at their own memory.
    graph = found.graph if links is not None and links.address != IPC else found.sized
    models = load_models(graph)
    log_warnings(models.warnings)
    with models.kept():
        async with _running_session(graph, models, recipe) as session:
            yield session


@asynccontextmanager
async def _running_session(
    graph: Graph, models: Models, recipe: GraphOpening
) -> AsyncIterator[Session]:
    async with _first_error(), AsyncExitStack() as stack, trio.open_nursery() as nursery:
        processes = processes_options(graph)
        engines, supervisor = await _engines(graph, processes, nursery, recipe)
        ready = plan(
            graph,
            recipe.resolver,
            {name: len(replicas) for name, replicas in engines.items()},
            functions=recipe.functions,
            encode=models.encode,
            seed=recipe.seed,
            facts={name: replicas[0].facts for name, replicas in engines.items()},
        )
        max_hold_s = processes.max_hold_s if processes else math.inf
        record = stack.enter_context(recording(recipe.decisions, ready, max_hold_s))
        make = partial(TasksExecutor, ready, engines=engines, max_hold_s=max_hold_s, record=record)
        session = Session(models, make)
        session.supervisor = supervisor
        await nursery.start(session.executor.run)
        if supervisor is not None:
            supervisor.watch(session.executor)
        try:
            yield session
        finally:
            with trio.CancelScope(shield=True):  # brief: an engine step at the most
                await session.close()
            nursery.cancel_scope.cancel()


async def _engines(
    graph: Graph,
    processes: ProcessesOptions | None,
    nursery: trio.Nursery,
    recipe: GraphOpening,
) -> "tuple[Mapping[str, tuple[Engine, ...]], Supervisor | None]":
    """The engines, in this process or each in a worker of its own."""
    if processes is None:
        return await open_engines(graph, recipe.progress), None
    start_workers = importlib.import_module(_WORKERS).start_workers
    supervisor: Supervisor = await start_workers(
        graph, processes, nursery, recipe.launch, recipe.progress
    )
    return supervisor.engines, supervisor


@asynccontextmanager
async def _first_error() -> AsyncIterator[None]:
    """Let an error of the caller's block, or of an engine, out of the nursery as it was raised.

    Where an engine's error made the caller's request fail, the engine's is the one that is raised.
    """
    try:
        yield
    except BaseExceptionGroup as group:
        causes = [error for error in group.exceptions if not isinstance(error, RequestFailed)]
        first = (causes or group.exceptions)[0]
        if len(causes) > 1:
            raise
        raise first from first.__cause__
