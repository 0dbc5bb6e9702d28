"""Opening a graph: check it, load its engines, build its operators, run its executor."""

from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from typing import Any

import sniffio
import trio

from sagellm.bridge import AsyncioSession, BlockingSession, Bridge
from sagellm.checking import check_graph
from sagellm.engines import open_engines
from sagellm.graphs.text.yaml import Document
from sagellm.logs import configure_logs
from sagellm.runtime.executors.tasks import TasksExecutor
from sagellm.runtime.plan import plan
from sagellm.runtime.resolver import Resolver
from sagellm.session import Session, encode_prompt


@dataclass(frozen=True, slots=True)
class Recipe:
    """All that it takes to open one graph."""

    document: Document
    resolver: Resolver
    functions: Mapping[str, Callable[..., Any]]
    overrides: Mapping[str, Any]
    model: str | None
    seed: int


class OpenGraph:
    """A graph about to be opened: `async with` under trio or asyncio, `with` in a plain thread.

    Leaving it ends what still runs, frees every block and stops every engine. Entering raises
    GraphError before any model is loaded, ModelError where one cannot be.
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
        self._recipe = Recipe(document, resolver, functions, overrides, model, seed)
        self._opened: AbstractAsyncContextManager[Session] | None = None
        self._bridge: Bridge | None = None

    async def __aenter__(self) -> Any:  # Session under trio, AsyncioSession under asyncio
        if sniffio.current_async_library() == "trio":
            self._opened = open_session(self._recipe)
            return await self._opened.__aenter__()
        self._bridge = Bridge(lambda: open_session(self._recipe))
        session: AsyncioSession = await self._bridge.open_asyncio()
        return session

    async def __aexit__(self, *error: Any) -> bool | None:
        if self._opened is not None:
            return await self._opened.__aexit__(*error)
        if self._bridge is not None:
            await self._bridge.close_asyncio()
        return None

    def __enter__(self) -> BlockingSession:
        self._bridge = Bridge(lambda: open_session(self._recipe))
        return self._bridge.open_blocking()

    def __exit__(self, *error: Any) -> None:
        if self._bridge is not None:
            self._bridge.close_blocking()


@asynccontextmanager
async def open_session(recipe: Recipe) -> AsyncIterator[Session]:
    """Run the graph in a nursery of its own for as long as the session is open."""
    configure_logs()
    graph = check_graph(
        recipe.document, recipe.resolver, recipe.functions, recipe.overrides, recipe.model
    )
    engines, tokenizer = await open_engines(graph)
    ready = plan(
        graph,
        recipe.resolver,
        engines,
        functions=recipe.functions,
        encode=lambda text: encode_prompt(tokenizer, text),
        seed=recipe.seed,
    )
    session = Session(tokenizer, lambda deliver: TasksExecutor(ready, deliver))
    async with _unwrapped(), trio.open_nursery() as nursery:
        await nursery.start(session.executor.run)
        try:
            yield session
        finally:
            with trio.CancelScope(shield=True):  # brief: an engine step at the most
                await session.close()
            nursery.cancel_scope.cancel()


@asynccontextmanager
async def _unwrapped() -> AsyncIterator[None]:
    """Let an error of the caller's block, or of an engine, out of the nursery as it was raised."""
    try:
        yield
    except BaseExceptionGroup as group:
        if len(group.exceptions) == 1:
            raise group.exceptions[0] from group.exceptions[0].__cause__
        raise
