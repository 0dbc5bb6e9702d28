"""`sagellm.sage.edge_app:app`: the gateway as an ASGI app inside the edge server of SAGE.

`SAGE_EDGE_GATEWAY_APP=sagellm.sage.edge_app:app` names it. The edge server mounts the app under a
prefix, where no lifespan runs: so the graph opens at the first call. SAGELLM_GRAPH names a graph or
a model, SAGELLM_ENGINE_MODEL a model; sage-tiny unless given. SAGELLM_API_KEY is the key that
callers must have, if any.
"""

import asyncio
import atexit
import importlib
import os
import threading
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import trio
from starlette.types import Receive, Scope, Send

from sagellm.builder import Graph
from sagellm.cli.graph_argument import choose_graphs
from sagellm.cli.keys import API_KEY_VARIABLE, read_keys
from sagellm.cli.serve import served_names
from sagellm.cli.serve_options import ServedModelOptions
from sagellm.gateway.http.app import App, build_app
from sagellm.gateway.lifecycle import gateway_of, meters_of, watch_readiness
from sagellm.gateway.protocol.sampling_params import model_cards
from sagellm.gateway.readiness import Readiness
from sagellm.gateway.settings import Settings
from sagellm.gateway.thread_bridge import open_thread_bridge
from sagellm.opening.open_graph import OpenGraph
from sagellm.sage.__main__ import DEFAULT_MODEL, MODEL_VARIABLE

GRAPH_VARIABLE = "SAGELLM_GRAPH"
_METHODS = ["GET", "POST", "DELETE", "OPTIONS", "HEAD", "PUT"]


@dataclass(frozen=True, slots=True)
class _OpenGateway:
    """A gateway whose graph runs in a trio thread."""

    app: App
    token: trio.lowlevel.TrioToken
    end: trio.Event
    thread: threading.Thread


class EdgeApp:
    """An ASGI app for an asyncio loop, whose graph opens at the first call.

    The end of the process, or `close`, ends the graph.
    """

    def __init__(self) -> None:
        self._opening: asyncio.Future[_OpenGateway] | None = None
        self._background: asyncio.Task[None] | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            message = await receive()
            await send({"type": f"{message['type']}.complete"})
            return
        opened = await self._opened()
        root = scope.get("root_path", "")
        path = scope["path"].removeprefix(root) or "/"
        raw = scope.get("raw_path", scope["path"].encode()).removeprefix(root.encode()) or b"/"
        bare = {**scope, "path": path, "raw_path": raw, "root_path": ""}
        await opened.app(bare, receive, send)

    @property
    def router(self) -> Any:
        """A router of FastAPI with this app at every path, as the edge server wants it for `/`."""
        router = importlib.import_module("fastapi").APIRouter()
        router.add_route("/{path:path}", self, methods=_METHODS, include_in_schema=False)
        return router

    async def close(self) -> None:
        """End open requests, and close the graph; the next call opens it again."""
        opening, self._opening = self._opening, None
        if self._background is not None:
            self._background.cancel()
            self._background = None
        if opening is not None:
            await asyncio.to_thread(_close, await opening)

    async def _opened(self) -> _OpenGateway:
        """The open gateway. Raises what the graph raises if it cannot be opened; the next call
        tries again.
        """
        if self._opening is None:
            self._opening = asyncio.ensure_future(asyncio.wrap_future(_open()))
        opening = self._opening
        try:
            opened = await asyncio.shield(opening)
        except Exception:
            if self._opening is opening:
                self._opening = None
            raise
        if self._background is None:
            self._background = asyncio.create_task(opened.app.run_background())
        return opened


def _open() -> "Future[_OpenGateway]":
    """Open the graph of the environment in a thread of its own."""
    found: Future[_OpenGateway] = Future()

    def run() -> None:
        try:
            trio.run(_serve, found)
        except BaseException as error:
            if not found.done():
                found.set_exception(error)

    thread = threading.Thread(target=run, name="sagellm-edge", daemon=True)
    thread.start()
    return found


async def _serve(found: "Future[_OpenGateway]") -> None:
    """Keep the graph open until the end event."""
    opening, settings = _chosen()
    async with (
        opening as session,
        open_thread_bridge(session, settings.streaming) as bridge,
        trio.open_nursery() as nursery,
    ):
        models, readiness = model_cards(session, settings), Readiness()
        meters = meters_of(session, settings, models)
        nursery.start_soon(meters.run)
        nursery.start_soon(watch_readiness, readiness, session, settings.streaming)
        opened = _OpenGateway(
            build_app(gateway_of(session, settings, bridge, meters, models, readiness)),
            trio.lowlevel.current_trio_token(),
            trio.Event(),
            threading.current_thread(),
        )
        atexit.register(_close, opened)
        found.set_result(opened)
        await opened.end.wait()
        nursery.cancel_scope.cancel()


def _close(opened: _OpenGateway) -> None:
    atexit.unregister(_close)
    try:
        opened.token.run_sync_soon(opened.end.set)
    except trio.RunFinishedError:
        return
    opened.thread.join()


def _chosen() -> tuple[OpenGraph, Settings]:
    """The graph and the settings of the environment. Raises Failure for wrong ones."""
    named = os.environ.get(GRAPH_VARIABLE) or os.environ.get(MODEL_VARIABLE) or DEFAULT_MODEL
    chosen, model = choose_graphs((named,), None, ())
    key = os.environ.get(API_KEY_VARIABLE)
    settings = Settings(
        server="uvicorn",
        api_keys=read_keys([key] if key else []),
        served_models=served_names(chosen, model, ServedModelOptions()),
        allowed_hosts=("*",),  # the edge server knows under which names it is reached
    )
    opening = chosen.open(model=model) if isinstance(chosen, Graph) else chosen
    return opening, settings


app = EdgeApp()
