"""The kernel dialect: every kernel, the rules of a kernel graph, and type inference."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from typing import TypeAlias

import msgspec

from sagellm.graphs.diagnostics import Diagnostic, GraphError
from sagellm.graphs.ir import SINK, SOURCE, Edge, EdgeType, Graph, Node, TensorType
from sagellm.graphs.kernels.kernel import KV, Kernel, ShapeError, Types
from sagellm.graphs.kernels.rowwise import ROWWISE
from sagellm.graphs.kernels.token_mixers import TOKEN_MIXERS
from sagellm.graphs.vocabulary import Vocabulary, nearest

KERNELS: dict[str, Kernel] = {kernel.spec.name: kernel for kernel in (*ROWWISE, *TOKEN_MIXERS)}
KERNEL_VOCABULARY = Vocabulary({name: kernel.spec for name, kernel in KERNELS.items()})

# The inputs of a step. T: new tokens; B: sequences; M: blocks of the longest sequence; R: rows of
# logits; N: blocks of a recurrent state. For a model with several block tables, `slots` and
# `block_tables` list all sequences for the first table, then all sequences for the second table.
STEP_INPUTS: dict[str, EdgeType] = {
    "token_ids": TensorType(("T",), "int64"),
    "positions": TensorType(("T",), "int64"),
    "token_types": TensorType(("T",), "int64"),  # of an encoder: 0; 1 in the second of two texts
    "slots": TensorType(("T",), "int64"),
    "query_starts": TensorType(("B+1",), "int64"),
    "context_lens": TensorType(("B",), "int64"),
    "block_tables": TensorType(("B", "M"), "int32"),
    "logit_rows": TensorType(("R",), "int64"),
    "states": TensorType(
        (2, "B", "N"), "int32"
    ),  # [0]: blocks that the step reads; [1]: blocks that it writes
    "kv": KV,
}
STEP_OUTPUTS = ("logits", "kv")  # of a step of a model that generates
VECTORS = "vectors"  # the output of a step of a model that embeds: one row for each sequence

KernelRule: TypeAlias = Callable[[Graph], Iterator[Diagnostic]]


def known_kernels(graph: Graph) -> Iterator[Diagnostic]:
    for node in graph.nodes:
        if node.op not in KERNELS:
            yield _breach("unknown-kernel", node.name, f"no kernel {node.op!r}", node.op, KERNELS)


def unique_names(graph: Graph) -> Iterator[Diagnostic]:
    for name, count in Counter(graph.names).items():
        if count > 1 or name in (SOURCE, SINK):
            yield _breach("duplicate-node", name, "the name of a node is its own alone")


def known_options(graph: Graph) -> Iterator[Diagnostic]:
    for node in graph.nodes:
        if node.op in KERNELS:
            yield from _option_breaches(node)


def known_ports(graph: Graph) -> Iterator[Diagnostic]:
    outlets, inlets = _outlet_names(graph), _inlet_names(graph)
    for edge in graph.edges:
        yield from _port_breaches(graph, edge, edge.source, edge.outlet, outlets)
        yield from _port_breaches(graph, edge, edge.target, edge.inlet, inlets)


def acyclic(graph: Graph) -> Iterator[Diagnostic]:
    try:
        graph.topological()
    except ValueError as error:
        yield Diagnostic("cycle", ("edges",), str(error))


def fed_once(graph: Graph) -> Iterator[Diagnostic]:
    fed = Counter((edge.target, edge.inlet) for edge in graph.edges)
    for name, inlets in _inlet_names(graph).items():
        for inlet in inlets:
            if fed[name, inlet] != 1:
                yield _breach(
                    "unfed-inlet", name, f"inlet {inlet!r} is fed {fed[name, inlet]} times"
                )


def outlets_used(graph: Graph) -> Iterator[Diagnostic]:
    used = {(edge.source, edge.outlet) for edge in graph.edges}
    for name, outlets in _outlet_names(graph).items():
        for outlet in outlets:
            if name != SOURCE and (name, outlet) not in used:
                yield _breach("dangling-outlet", name, f"nothing uses outlet {outlet!r}")


def states_linear(graph: Graph) -> Iterator[Diagnostic]:
    """The KV state goes from kernel to kernel, one user at a time. So its edges order the writes to
    the pool and the reads from it.
    """
    used = Counter(edge.source for edge in graph.edges if edge.outlet == KV)
    for name, count in used.items():
        if count > 1:
            yield _breach("state-shared", name, f"state {KV!r} goes to {count} nodes; thread it")
    for edge in graph.edges:
        if (edge.outlet == KV) != (edge.inlet == KV):
            yield _breach("state-mixed", edge.target, f"{edge}: a state feeds a state inlet alone")


NAME_RULES: tuple[KernelRule, ...] = (known_kernels, unique_names, known_options, known_ports)
WIRING_RULES: tuple[KernelRule, ...] = (acyclic, fed_once, outlets_used, states_linear)


def verify(graph: Graph) -> tuple[Diagnostic, ...]:
    """Find every breach of a rule. Wiring is checked only if all ops, inlets and outlets exist."""
    known = tuple(found for rule in NAME_RULES for found in rule(graph))
    return known or tuple(found for rule in WIRING_RULES for found in rule(graph))


def _port_breaches(
    graph: Graph, edge: Edge, name: str, port: str, ports: Mapping[str, tuple[str, ...]]
) -> Iterator[Diagnostic]:
    """Report an inlet or outlet that a node lacks. Nodes of an unknown kernel are skipped, because
    `known_kernels` reports them.
    """
    known = ports.get(name, ())
    if port in known or (name not in ports and name in graph.names):
        return
    yield _breach("unknown-port", name, f"{edge}: no port {port!r}", port, known)


def _option_breaches(node: Node) -> Iterator[Diagnostic]:
    kernel = KERNELS[node.op]
    known = list(kernel.spec.option_types)
    for option in node.attrs:
        if option not in known:
            yield _breach("unknown-option", node.name, f"no option {option!r}", option, known)
    try:
        kernel.options(node)
    except msgspec.ValidationError as error:
        yield _breach("bad-option", node.name, f"{node.op}: {error}")


def _breach(
    code: str, node: str, message: str, name: str = "", known: Iterable[str] = ()
) -> Diagnostic:
    close = nearest(name, list(known)) if name else None
    hint = f"did you mean {close!r}?" if close else None
    return Diagnostic(code, ("nodes", node), f"{node}: {message}", hint)


def _outlet_names(graph: Graph) -> dict[str, tuple[str, ...]]:
    ports = {n.name: tuple(p.name for p in KERNELS[n.op].spec.outlets) for n in _known_nodes(graph)}
    return {SOURCE: tuple(STEP_INPUTS), **ports}


def _inlet_names(graph: Graph) -> dict[str, tuple[str, ...]]:
    ports = {n.name: tuple(p.name for p in KERNELS[n.op].spec.inlets) for n in _known_nodes(graph)}
    return {SINK: _sink_inlets(graph), **ports}


def _sink_inlets(graph: Graph) -> tuple[str, ...]:
    """The outputs that a graph must have: vectors, if it has any, or else logits and KV state."""
    is_embedding = any(edge.inlet == VECTORS for edge in graph.inputs(SINK))
    return (VECTORS,) if is_embedding else STEP_OUTPUTS


def _known_nodes(graph: Graph) -> Iterator[Node]:
    return (node for node in graph.nodes if node.op in KERNELS)


def infer(graph: Graph) -> Graph:
    """The graph with the type of every edge filled in.

    Raises GraphError with the breaches that `verify` finds, or for the first node that does not
    accept the types of its inlets.
    """
    found = verify(graph)
    if found:
        raise GraphError(found)
    types: dict[tuple[str, str], EdgeType] = {(SOURCE, k): v for k, v in STEP_INPUTS.items()}
    for node in graph.topological():
        types |= _outlet_types(node, _inlet_types(graph, node.name, types))
    return replace(
        graph, edges=tuple(replace(e, type=types[e.source, e.outlet]) for e in graph.edges)
    )


def result_of(graph: Graph) -> Edge:
    """The edge with the tensor that a step of the graph results in: logits, or vectors."""
    (edge,) = (edge for edge in graph.inputs(SINK) if edge.inlet in ("logits", VECTORS))
    return edge


def logits_type(graph: Graph) -> EdgeType | None:
    """The type of the logits; None before `infer`."""
    return next((edge.type for edge in graph.inputs(SINK) if edge.inlet == "logits"), None)


def _inlet_types(graph: Graph, name: str, types: dict[tuple[str, str], EdgeType]) -> Types:
    return {edge.inlet: types[edge.source, edge.outlet] for edge in graph.inputs(name)}


def _outlet_types(node: Node, inlets: Types) -> dict[tuple[str, str], EdgeType]:
    try:
        outlets = KERNELS[node.op].outlet_types(node, inlets)
    except ShapeError as error:
        where = ("nodes", node.name)
        message = f"{node.name} ({node.op}): {error}"
        raise GraphError((Diagnostic("shape-mismatch", where, message),)) from None
    return {(node.name, outlet): kind for outlet, kind in outlets.items()}
