"""`sagellm graph`: check a graph; print or draw a graph or the kernel graph of a model."""

from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Literal, Protocol

import msgspec

from sagellm.builder import Graph
from sagellm.cli.errors import CONFIGURATION, Failure, suggestion
from sagellm.cli.graph_argument import (
    Assignments,
    Imports,
    choose_graph,
    find_graph_file,
    import_code,
    parse_assignments,
)
from sagellm.extensions import RESOLVER
from sagellm.graphs import ir
from sagellm.graphs.check import Facts, locate
from sagellm.graphs.diagnostics import Diagnostic, GraphError
from sagellm.graphs.kernels import infer
from sagellm.graphs.models import build
from sagellm.graphs.passes import KERNEL_PASSES, UnknownPass, run_pipeline
from sagellm.graphs.passes.placement import AttachBodies, Place
from sagellm.graphs.rules.option_types import executor_options
from sagellm.graphs.rules.rule import CheckContext
from sagellm.graphs.text.draw import as_mermaid, as_svg, as_text
from sagellm.graphs.text.yaml import Document
from sagellm.graphs.vocabulary import Vocabulary
from sagellm.opening.checking import check_graph
from sagellm.opening.graph_engines import engine_options
from sagellm.opening.sources import override
from sagellm.runtime.cluster.executor_options import EXECUTORS, processes_options
from sagellm.runtime.engine.options import PagedOptions
from sagellm.runtime.kv.transports import TRANSPORTS
from sagellm.runtime.models.folder import resolve_model
from sagellm.runtime.registry import FUNCTIONS

ATTACH = AttachBodies().name
PASS_NAMES = (ATTACH, *(step.name for step in KERNEL_PASSES))
_SHOWN_EXECUTOR_OPTIONS = ("address", "kv")  # drawn even if they have their defaults

DrawingFormat = Literal["text", "mermaid", "svg"]


def check(
    file: str,
    /,
    *,
    model: str | None = None,
    set_: Assignments = (),
    import_: Imports = (),
    json: bool = False,
) -> int:
    """Find every mistake of a graph without loading a model.

    Parameters
    ----------
    file
        A graph file, the name of a shipped graph, or a model, which is checked in the graph joint.
    model
        Check a graph with this model in every engine.
    set_
        Check it with an option changed, as op.key=value; may be repeated.
    json
        Print {"ok", "name", "hash", "mistakes": [...]}.
    """
    try:
        named, model = choose_graph(file, model, import_)
        graph = check_graph(named.document, RESOLVER, FUNCTIONS, parse_assignments(set_), model)
    except GraphError as error:
        if not json:
            raise  # `main` shows it
        mistakes = [_as_fields(mistake) for mistake in error.diagnostics]
        print(_encode({"ok": False, "mistakes": mistakes}))
        return CONFIGURATION
    if json:
        print(_encode({"ok": True, "name": graph.name, "hash": graph.hash, "mistakes": []}))
    else:
        print(f"{file}: ok, graph {graph.name} of {len(graph.nodes)} operators, {graph.hash}")
    return 0


def show(
    file: str,
    /,
    *,
    node: str | None = None,
    after: str | None = None,
    format: DrawingFormat = "text",
    unfold: bool = False,
    executor: str | None = None,
    set_: Assignments = (),
    import_: Imports = (),
) -> None:
    """Print a graph, or the kernel graph that an engine runs.

    Parameters
    ----------
    file
        A graph file or the name of a shipped graph; or a model, whose kernel graph is shown.
    node
        Show the kernel graph of this operator's engine.
    after
        Show kernel graphs as they are after this pass; for a graph, print its kernel graphs after
        it.
        attach_bodies leaves them as built; then come the passes that fuse kernels. place shows the
        processes that a graph runs in, and their links.
    format
        text, mermaid or svg.
    unfold
        Show every layer of a kernel graph and every replica of a worker; else those that are alike
        are shown once, with their number.
    executor
        Show the graph under this executor: tasks, in one process; or processes, a worker for each
        engine replica.
    set_
        Show the graph with an option changed, as op.key=value; may be repeated.
    """
    import_code(import_)
    overrides = {} if executor is None else {"executor.kind": executor}
    graph = _shown_graph(file, node, after, overrides | parse_assignments(set_))
    print(FORMATS[format](graph, unfold=unfold), end="")


class _Drawer(Protocol):
    def __call__(self, graph: ir.Graph, *, unfold: bool) -> str: ...


def _as_texts(graph: ir.Graph, *, unfold: bool) -> str:
    """The graph as text, followed by each distinct kernel graph of its nodes."""
    # By hash: engines of one model share a kernel graph, which is printed once.
    bodies = {inner.body.hash: inner.body for inner in graph.nodes if inner.body}
    return "\n".join(as_text(one, unfold=unfold) for one in (graph, *bodies.values()))


FORMATS: dict[DrawingFormat, _Drawer] = {
    "text": _as_texts,
    "mermaid": as_mermaid,
    "svg": as_svg,
}


def _shown_graph(
    file: str, node: str | None, after: str | None, overrides: dict[str, object]
) -> ir.Graph:
    found = find_graph_file(file)
    if found is None:
        if node or overrides:
            cause = "--node, --set and --executor are for graphs, and this is a model"
            raise Failure(cause, "leave them out", file)
        return kernel_graph(file, after)
    document = Graph.load(found).document
    graph = override(document.graph, overrides)
    # The placement and the given overrides need a valid executor; other drawings do not.
    if after == Place().name or any(name.startswith("executor.") for name in overrides):
        _check_executor(graph, document)
    if node is not None:
        return kernel_graph(_model_at(graph, node), after)
    if after == Place().name:
        return _placed(graph)
    return graph if after is None else _with_bodies(graph, after)


def _check_executor(graph: ir.Graph, document: Document) -> None:
    """Raise GraphError for an unknown executor, and for a wrong option of the executor."""
    facts = Facts(executors=EXECUTORS, names={"transports": TRANSPORTS})
    found = tuple(executor_options(CheckContext(graph, Vocabulary({}), facts)))
    if found:
        raise GraphError(locate(found, document.positions))


def _placed(graph: ir.Graph) -> ir.Graph:
    """The graph after pass `place`. The caller must have checked the executor."""
    options = processes_options(graph)
    if options is not None:
        links = {name: ir.freeze(asdict(options)[name]) for name in _SHOWN_EXECUTOR_OPTIONS}
        given = graph.attrs["executor"]
        assert isinstance(given, ir.FrozenMap)
        executor = ir.FrozenMap({**given, **links})
        graph = replace(graph, attrs=ir.FrozenMap({**graph.attrs, "executor": executor}))
    return Place().apply(graph)


def _with_bodies(graph: ir.Graph, after: str) -> ir.Graph:
    """The stream graph, with each engine's kernel graph attached as it is after pass `after`."""
    if after not in (*PASS_NAMES, ATTACH):
        raise _unknown("pass", after, (Place().name, *PASS_NAMES))
    until = None if after == ATTACH else after
    bodies = {engine: kernel_graph(model, until) for engine, model in _models(graph).items()}
    return AttachBodies(bodies).apply(graph)


def kernel_graph(model: str, after: str | None) -> ir.Graph:
    """The typed kernel graph of a model, after the passes up to `after`; None runs no pass.

    Raises Failure for an unknown pass.
    """
    built = build(resolve_model(model).config)
    if after is None:
        return infer(built)
    try:
        return infer(run_pipeline(built, KERNEL_PASSES, stop_after=after))
    except UnknownPass:
        raise _unknown("pass", after, PASS_NAMES) from None


def _model_at(graph: ir.Graph, node: str) -> str:
    if node not in graph.names:
        raise _unknown("operator", node, graph.names)
    engine = graph.node(node).attrs.get("engine")
    model = _models(graph).get(engine) if isinstance(engine, str) else None
    if model is None:
        cause = f"operator {node} has no engine that computes, hence no kernel graph"
        raise Failure(cause, "choose another")
    return model


def _models(graph: ir.Graph) -> dict[str, str]:
    """Engine name -> model, for engines that have a kernel graph."""
    return {
        name: options.model
        for name in graph.engines
        if isinstance(options := engine_options(graph, name), PagedOptions)
    }


def _unknown(kind: str, name: str, known: Sequence[str]) -> Failure:
    return Failure(f"no {kind} {name!r}", suggestion(name, known))


def _as_fields(mistake: Diagnostic) -> dict[str, object]:
    place = mistake.position
    return {
        "code": mistake.code,
        "path": list(mistake.path),
        "file": place.file if place else None,
        "line": place.line if place else None,
        "column": place.column if place else None,
        "message": mistake.message,
        "hint": mistake.hint,
    }


def _encode(value: object) -> str:
    return msgspec.json.encode(value).decode()
