"""Opens a graph as a session: checks it, loads engines, builds operators, runs the executor."""

import importlib
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
from sagellm.opening.checking import checked_graph, log_warnings
from sagellm.opening.decisions import DecisionFile, recording
from sagellm.opening.graph_engines import open_engines
from sagellm.opening.tokenizers import load_models
from sagellm.runtime.cluster.executor_options import (
    IPC,
    ProcessesOptions,
    executor_options,
    processes_options,
)
from sagellm.runtime.executors.tasks import TasksExecutor
from sagellm.runtime.plan import plan
from sagellm.runtime.port import Engine
from sagellm.runtime.resolver import Resolver
from sagellm.session import RequestFailed, Session
from sagellm.session.models import Models

_SERVING = "sagellm.http_server"  # imported on demand: only `serve` needs the HTTP packages
HOW_TO_OPEN = (
    "`async with graph.open() as session` under trio or asyncio, "
    "`with graph.open() as session` elsewhere"
)
# Imported on demand: importing the supervisor takes 0.1 s, and most graphs have no workers.
_WORKERS = "sagellm.opening.worker_processes"

_BRIDGE = "sagellm.opening.bridge"  # imported on demand: code under trio needs none

if TYPE_CHECKING:
    from sagellm.opening.bridge import AsyncioSession, BlockingSession, Bridge
    from sagellm.runtime.cluster.launch import ProcessLauncher
    from sagellm.runtime.cluster.supervisor import Supervisor

LaunchProcesses: TypeAlias = "Callable[[ProcessesOptions], ProcessLauncher]"


@dataclass(frozen=True, slots=True)
class GraphOpening:
    """The arguments for opening one graph."""

    document: Document
    resolver: Resolver
    functions: Mapping[str, Callable[..., Any]]
    overrides: Mapping[str, Any]
    model: str | None
    seed: int
    launch: "LaunchProcesses | None" = None  # replaces the usual start of worker processes
    progress: Progress = silent  # called with each event while engines load
    decisions: DecisionFile | None = None


@misused(__await__=f"a graph is not awaited: {HOW_TO_OPEN}")
@unopened(HOW_TO_OPEN)
class OpenGraph:
    """A context that opens a graph: `async with` under trio or asyncio, `with` in a plain thread.

    Entering returns the session. It raises GraphError before any model is loaded, ModelError for a
    model that fails to load, and UsageError if the graph is open already or if `with` would block
    an event loop. Leaving cancels running requests, frees every block and stops every engine.
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
        """The model that replaces the model of every engine, or None."""
        return self._recipe.model

    def with_overrides(self, more: Mapping[str, Any]) -> "OpenGraph":
        """A copy of this graph, not open, with further options set."""
        recipe = self._recipe
        other = copy(self)
        other._left()  # the copy must not close a session of this graph
        other._recipe = replace(recipe, overrides={**recipe.overrides, **more})
        return other

    def serve(self, **options: Any) -> None:
        """Serve the graph over HTTP until SIGTERM or Ctrl-C; see `sagellm.serve`."""
        importlib.import_module(_SERVING).serve(self, **options)

    async def serve_async(self, **options: Any) -> None:
        """Serve the graph under trio; see `sagellm.http_server.serve_async`."""
        await importlib.import_module(_SERVING).serve_async(self, **options)

    def launch_by(self, launch: "LaunchProcesses") -> None:
        """Set the function that makes the launcher of worker processes."""
        self._recipe = replace(self._recipe, launch=launch)

    def record_to(self, decisions: DecisionFile) -> None:
        """Write a decision log of the graph to a file: see `docs/operations.md`."""
        self._recipe = replace(self._recipe, decisions=decisions)

    def report_to(self, progress: Progress) -> None:
        """Report the progress of loading to `progress`, which any thread may call.

        The events are those of `backends/interface.py`.
        """
        self._recipe = replace(self._recipe, progress=progress)

    async def __aenter__(self) -> Any:  # Session under trio, AsyncioSession under asyncio
        with self._entering():
            if sniffio.current_async_library() == "trio":
                self._opened = open_session(self._recipe)
                return await self._opened.__aenter__()
            self._bridge = self._new_bridge()
            session: AsyncioSession = await self._bridge.open_asyncio()
            return session

    async def __aexit__(self, *error: Any) -> bool | None:
        opened, bridge = self._left()
        if opened is not None:
            return await opened.__aexit__(*error)
        if bridge is not None:
            await bridge.close_asyncio()
        return None

    def __enter__(self) -> "BlockingSession":
        refuse_in_loop("`with graph.open()`", "`async with graph.open()`")
        with self._entering():
            self._bridge = self._new_bridge()
            return self._bridge.open_blocking()

    def __exit__(self, *error: Any) -> None:
        _, bridge = self._left()
        if bridge is not None:
            bridge.close_blocking()

    def _new_bridge(self) -> "Bridge":
        bridge: Bridge = importlib.import_module(_BRIDGE).Bridge(lambda: open_session(self._recipe))
        return bridge

    def _left(self) -> "tuple[AbstractAsyncContextManager[Session] | None, Bridge | None]":
        """Reset to the state before entering. Returns the context or the bridge, for closing.

        The graph may then be entered again, also under another event loop.
        """
        opened, bridge = self._opened, self._bridge
        self._opened, self._bridge, self._is_entered = None, None, False
        return opened, bridge

    @contextmanager
    def _entering(self) -> Iterator[None]:
        """Mark the graph as open; an error in the block resets the mark.

        Raises UsageError if the graph is open already.
        """
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
    """Open a session. The graph runs in a nursery of its own until the block ends."""
    found = checked_graph(
        recipe.document, recipe.resolver, recipe.functions, recipe.overrides, recipe.model
    )
    links = processes_options(found.graph)
    # A worker over tcp may run on another machine: it sizes its pools by that machine's memory.
    graph = found.graph if links is not None and links.address != IPC else found.sized
    async with _running_session(graph, recipe) as session:
        yield session


@asynccontextmanager
async def _running_session(graph: Graph, recipe: GraphOpening) -> AsyncIterator[Session]:
    async with _first_error(), AsyncExitStack() as stack, trio.open_nursery() as nursery:
        processes = processes_options(graph)
        if processes is not None:  # workers keep their tokenizers to themselves
            models = _models(graph, stack)
        engines, supervisor = await _engines(graph, processes, nursery, recipe)
        if processes is None:  # engines have read their tokenizers beside their weights
            models = _models(graph, stack)
        ready = plan(
            graph,
            recipe.resolver,
            {name: len(replicas) for name, replicas in engines.items()},
            functions=recipe.functions,
            encode=models.encode,
            seed=recipe.seed,
            facts={name: replicas[0].facts for name, replicas in engines.items()},
        )
        max_hold_s = executor_options(graph).max_hold_s
        record = stack.enter_context(recording(recipe.decisions, ready, max_hold_s))
        make = partial(TasksExecutor, ready, engines=engines, max_hold_s=max_hold_s, record=record)
        session = Session(models, make)
        session.supervisor = supervisor
        if supervisor is not None:
            allow_scaling = importlib.import_module(_WORKERS).allow_scaling
            await allow_scaling(graph, supervisor, session.executor, nursery)
        await nursery.start(session.executor.run)  # returns when the executor accepts requests
        if supervisor is not None:  # it started before the executor, which needs its engines
            supervisor.watch(session.executor)
        try:
            yield session
        finally:
            with trio.CancelScope(shield=True):  # lasts one engine step at most
                await session.close()
            nursery.cancel_scope.cancel()  # ends the tasks that run until cancelled


def _models(graph: Graph, stack: AsyncExitStack) -> Models:
    """Load the models of a graph. Their helper processes are kept until `stack` ends."""
    models = load_models(graph)
    log_warnings(models.warnings)
    stack.enter_context(models.kept())
    return models


async def _engines(
    graph: Graph,
    processes: ProcessesOptions | None,
    nursery: trio.Nursery,
    recipe: GraphOpening,
) -> "tuple[Mapping[str, tuple[Engine, ...]], Supervisor | None]":
    """Open the engines, and return them with their supervisor (None without worker processes)."""
    if processes is None:
        return await open_engines(graph, recipe.progress), None
    start_workers = importlib.import_module(_WORKERS).start_workers
    supervisor: Supervisor = await start_workers(
        graph, processes, nursery, recipe.launch, recipe.progress
    )
    return supervisor.engines, supervisor


@asynccontextmanager
async def _first_error() -> AsyncIterator[None]:
    """Replace the nursery's exception group by the one error in it.

    An engine's error makes the caller's requests fail, too: a RequestFailed beside another error is
    left out. Several other errors stay a group.
    """
    try:
        yield
    except BaseExceptionGroup as group:
        causes = [error for error in group.exceptions if not isinstance(error, RequestFailed)]
        first = (causes or group.exceptions)[0]
        if len(causes) > 1:
            raise
        raise first from first.__cause__
