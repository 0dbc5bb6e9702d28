"""Shape and dtype inference: the type of every edge, from the step inputs onwards."""

from dataclasses import replace

from sagellm.graphs.diagnostics import Diagnostic, GraphError
from sagellm.graphs.ir import SINK, SOURCE, EdgeType, Graph, Node
from sagellm.graphs.kernels.kernel import ShapeError, Types
from sagellm.graphs.kernels.rules import verify
from sagellm.graphs.kernels.vocabulary import KERNELS, STEP_INPUTS


def infer(graph: Graph) -> Graph:
    """The same graph with the type of every edge filled in.

    Raises GraphError: what `verify` finds, or the first node whose inlets do not fit it.
    """
    found = verify(graph)
    if found:
        raise GraphError(found)
    types: dict[tuple[str, str], EdgeType] = {(SOURCE, k): v for k, v in STEP_INPUTS.items()}
    for node in graph.topological():
        types |= _outlets(node, _inlets(graph, node.name, types))
    return replace(
        graph, edges=tuple(replace(e, type=types[e.source, e.outlet]) for e in graph.edges)
    )


def logits_type(graph: Graph) -> EdgeType | None:
    """The type of the graph's logits, once inferred."""
    return next((edge.type for edge in graph.inputs(SINK) if edge.inlet == "logits"), None)


def _inlets(graph: Graph, name: str, types: dict[tuple[str, str], EdgeType]) -> Types:
    return {edge.inlet: types[edge.source, edge.outlet] for edge in graph.inputs(name)}


def _outlets(node: Node, inlets: Types) -> dict[tuple[str, str], EdgeType]:
    try:
        outlets = KERNELS[node.op].outlet_types(node, inlets)
    except ShapeError as error:
        where = ("nodes", node.name)
        message = f"{node.name} ({node.op}): {error}"
        raise GraphError((Diagnostic("shape-mismatch", where, message),)) from None
    return {(node.name, outlet): kind for outlet, kind in outlets.items()}
