"""Serves an open session over HTTP: builds the gateway, probes the graph, serves and drains."""

from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager, nullcontext
from importlib import import_module
from socket import socket

import trio

from sagellm.gateway.budgets import Budgets
from sagellm.gateway.gateway import Gateway, HostedModel
from sagellm.gateway.graph_bridge import GraphBridge, SessionBridge
from sagellm.gateway.http.app import App, build_app
from sagellm.gateway.http.drain import (
    GatewayServing,
    HttpServer,
    ServingHere,
    ending_signals,
    serve,
)
from sagellm.gateway.http.routes import PATHS
from sagellm.gateway.metrics.exposition import GatewayMeters
from sagellm.gateway.processes.supervision import GatewaysFailed, GatewaySupervisor
from sagellm.gateway.protocol.sampling_params import ModelCard, model_cards
from sagellm.gateway.readiness import Probe, Readiness
from sagellm.gateway.settings import Settings, Streaming, banner, url_of
from sagellm.gateway.thread_bridge import open_thread_bridge
from sagellm.graphs.ir import Graph
from sagellm.graphs.sections import OPENAI, engine_kind
from sagellm.runtime.cluster.control import ControlCommands, serve_control
from sagellm.runtime.cluster.control_commands import OneProcessCommands
from sagellm.runtime.engine.kinds import KINDS
from sagellm.runtime.models import HelperUnavailable, TextError
from sagellm.runtime.models.tokenizer import Tokenizer
from sagellm.session import Session
from sagellm.tracing import open_tracing

PROBE_TEXT = "Hello"
_FOREIGN = "sagellm.foreign.servers"  # imported only for a graph with servers of others
_SERVERS = {  # imported only if chosen: uvicorn is an optional dependency
    "hypercorn": ("sagellm.gateway.http.hypercorn", "HypercornServer"),
    "uvicorn": ("sagellm.gateway.http.uvicorn", "UvicornServer"),
}


def server_class(name: str) -> Callable[[App, Settings, socket], HttpServer]:
    """Return the class of a server. Raises ModuleNotFoundError if its extra is not installed."""
    module, attribute = _SERVERS[name]
    found: Callable[[App, Settings, socket], HttpServer] = getattr(import_module(module), attribute)
    return found


async def serve_graph(
    opening: AbstractAsyncContextManager[Session],
    settings: Settings,
    sock: socket,
    announce: Callable[[str], None],
) -> None:
    """Open the graph and serve it on a bound socket, until SIGTERM or SIGINT.

    `announce` is called with the banner as soon as the gateway accepts connections.
    """
    async with opening as session:
        with ending_signals() as signals:
            await serve_session(session, settings, sock, signals, announce)


async def serve_session(
    session: Session,
    settings: Settings,
    sock: socket,
    signals: AsyncIterator[int],
    announce: Callable[[str], None],
) -> None:
    """Serve an open session on a bound socket, until the first of `signals`.

    Raises GatewaysFailed if a gateway process cannot be started. See `serve_graph`.
    """
    if settings.num_gateways:
        _check_kinds(session.executor.plan.graph)
    models, readiness = model_cards(session, settings), Readiness()
    has_chat = session.tokenizer.chat_template is not None
    names = [card.id for card in models]
    said = banner(url_of(sock, settings), names, settings, has_chat=has_chat)
    async with (
        _unwrapped(),
        _traced(session, settings, models),
        _bridge(session, settings) as bridge,
        trio.open_nursery() as nursery,
    ):
        meters = meters_of(session, settings, models)
        serving: GatewayServing
        if settings.num_gateways:
            serving = GatewaySupervisor(session, settings, models, meters, readiness, sock)
        else:
            app = build_app(gateway_of(session, settings, bridge, meters, models, readiness))
            serving = ServingHere(server_class(settings.server)(app, settings, sock), app)
            if settings.server == "hypercorn":  # `UvicornServer` does this on its own loop
                nursery.start_soon(app.run_background)
        if session.supervisor is None:  # a supervisor opens a control socket itself
            await nursery.start(serve_control, _commands(session))
        nursery.start_soon(meters.run)
        nursery.start_soon(watch_readiness, readiness, session, settings.streaming)
        await serve(serving, settings, signals, session.close, lambda: announce(said))
        nursery.cancel_scope.cancel()  # ends the app's tasks, the meters, the control and the watch


def _commands(session: Session) -> ControlCommands:
    """The commands on a graph without workers, and on servers if it has an engine for them."""
    executor, graph = session.executor, session.executor.plan.graph
    commands = OneProcessCommands(graph, executor.engines)
    if OPENAI not in map(engine_kind, graph.engines.values()):
        return commands
    found = import_module(_FOREIGN)
    both: ControlCommands = found.ServerCommands(found.Servers(graph, executor), commands)
    return both


def _check_kinds(graph: Graph) -> None:
    """Raise GatewaysFailed for engine kinds that this program registers.

    Gateway processes run another main module, and cannot import them.
    """
    kinds = {engine_kind(values) for values in graph.engines.values()}
    for kind in filter(KINDS.is_registered_here, sorted(kinds)):
        raise GatewaysFailed(
            f"gateway processes do not know the engine kind {kind!r} that this program registers: "
            "install it as a package, or serve without --gateways"
        )


def gateway_of(
    session: Session,
    settings: Settings,
    bridge: GraphBridge,
    meters: GatewayMeters,
    models: Sequence[ModelCard],
    readiness: Readiness,
) -> Gateway:
    return Gateway(
        settings=settings,
        bridge=bridge,
        models=tuple(
            HostedModel(card, model.tokenizer)
            for card, model in zip(models, session.models.all, strict=True)
        ),
        readiness=readiness,
        budgets=Budgets(settings.common_budget, own=settings.budgets),
        meters=meters,
        graph=session.executor.plan.graph,
    )


def meters_of(session: Session, settings: Settings, models: Sequence[ModelCard]) -> GatewayMeters:
    return GatewayMeters(
        session,
        models=models,
        endpoints=PATHS,
        compat=settings.metrics_compat,
    )


@asynccontextmanager
async def _unwrapped() -> AsyncIterator[None]:
    """Raise GatewaysFailed without the exception groups of nurseries around it."""
    try:
        yield
    except BaseExceptionGroup as group:
        found: BaseException | None = group.subgroup(GatewaysFailed)
        if found is None:
            raise
        while isinstance(found, BaseExceptionGroup):
            found = found.exceptions[0]
        raise found from group


@asynccontextmanager
async def _bridge(session: Session, settings: Settings) -> AsyncIterator[GraphBridge]:
    """Open the bridge to the app's loop: this loop, or uvicorn's asyncio loop in a thread."""
    if settings.server == "hypercorn" or settings.num_gateways:
        yield SessionBridge(session, settings.streaming)
        return
    async with open_thread_bridge(session, settings.streaming) as bridge:
        yield bridge


def _traced(
    session: Session, settings: Settings, models: Sequence[ModelCard]
) -> AbstractAsyncContextManager[None]:
    if settings.otlp_endpoint is None:
        return nullcontext()
    return open_tracing(
        session,
        endpoint=settings.otlp_endpoint,
        model=models[0].id,
        names={card.key: card.id for card in models if card.key},
        sample=settings.trace_sample,
    )


def _probe(tokenizer: Tokenizer) -> tuple[int, ...]:
    """Return the tokens of a probe's prompt; token 0 if the tokenizer fails.

    A probe tests the graph and not the tokenizer, so any token will do.
    """
    try:
        return tokenizer.encode(PROBE_TEXT) or (0,)
    except (TextError, HelperUnavailable):
        return (0,)


async def watch_readiness(readiness: Readiness, session: Session, streaming: Streaming) -> None:
    """Probe and watch the graph until cancelled. The probes use a bridge on this loop."""
    probes = []
    for model in session.models.all:
        # In a thread: a tokenizer that comes with a model may take long, and would stall this loop.
        token_ids = await trio.to_thread.run_sync(_probe, model.tokenizer, abandon_on_cancel=True)
        probes.append(Probe(token_ids, PROBE_TEXT, model.key))
    await readiness.watch(SessionBridge(session, streaming), session.health, probes)
