"""What every kernel graph obeys, as a table of rules; each yields what it finds wrong."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping

import msgspec

from sagellm.graphs.diagnostics import Diagnostic
from sagellm.graphs.ir import SINK, SOURCE, Edge, Graph, Node
from sagellm.graphs.kernels.kernel import KV
from sagellm.graphs.kernels.vocabulary import KERNELS, STEP_INPUTS, STEP_OUTPUTS
from sagellm.graphs.vocabulary import nearest

Rule = Callable[[Graph], Iterator[Diagnostic]]


def verify(graph: Graph) -> tuple[Diagnostic, ...]:
    """Every breach of a rule. Rules after the first table assume that ops and ports are known."""
    known = tuple(found for rule in NAMES for found in rule(graph))
    return known or tuple(found for rule in WIRING for found in rule(graph))


def known_kernels(graph: Graph) -> Iterator[Diagnostic]:
    for node in graph.nodes:
        if node.op not in KERNELS:
            yield _fault("unknown-kernel", node.name, f"no kernel {node.op!r}", node.op, KERNELS)


def unique_names(graph: Graph) -> Iterator[Diagnostic]:
    for name, count in Counter(graph.names).items():
        if count > 1 or name in (SOURCE, SINK):
            yield _fault("duplicate-node", name, "the name of a node is its own alone")


def known_options(graph: Graph) -> Iterator[Diagnostic]:
    for node in graph.nodes:
        if node.op in KERNELS:
            yield from _options(node)


def known_ports(graph: Graph) -> Iterator[Diagnostic]:
    outlets, inlets = _outlets(graph), _inlets(graph)
    for edge in graph.edges:
        yield from _known_port(graph, edge, edge.source, edge.outlet, outlets)
        yield from _known_port(graph, edge, edge.target, edge.inlet, inlets)


def acyclic(graph: Graph) -> Iterator[Diagnostic]:
    try:
        graph.topological()
    except ValueError as error:
        yield Diagnostic("cycle", ("edges",), str(error))


def fed_once(graph: Graph) -> Iterator[Diagnostic]:
    fed = Counter((edge.target, edge.inlet) for edge in graph.edges)
    for name, inlets in _inlets(graph).items():
        for inlet in inlets:
            if fed[name, inlet] != 1:
                yield _fault(
                    "unfed-inlet", name, f"inlet {inlet!r} is fed {fed[name, inlet]} times"
                )


def outlets_used(graph: Graph) -> Iterator[Diagnostic]:
    used = {(edge.source, edge.outlet) for edge in graph.edges}
    for name, outlets in _outlets(graph).items():
        for outlet in outlets:
            if name != SOURCE and (name, outlet) not in used:
                yield _fault("dangling-outlet", name, f"nothing uses outlet {outlet!r}")


def states_linear(graph: Graph) -> Iterator[Diagnostic]:
    """A state has one user at a time: that is what orders writes and reads."""
    used = Counter(edge.source for edge in graph.edges if edge.outlet == KV)
    for name, count in used.items():
        if count > 1:
            yield _fault("state-shared", name, f"state {KV!r} goes to {count} nodes; thread it")
    for edge in graph.edges:
        if (edge.outlet == KV) != (edge.inlet == KV):
            yield _fault("state-mixed", edge.target, f"{edge}: a state feeds a state inlet alone")


NAMES: tuple[Rule, ...] = (known_kernels, unique_names, known_options, known_ports)
WIRING: tuple[Rule, ...] = (acyclic, fed_once, outlets_used, states_linear)


def _known_port(
    graph: Graph, edge: Edge, name: str, port: str, ports: Mapping[str, tuple[str, ...]]
) -> Iterator[Diagnostic]:
    """Nodes of an unknown kernel have been reported, and their ports are anyone's guess."""
    if name in graph.names and name not in ports:
        return
    known = ports.get(name, ())
    if port not in known:
        yield _fault("unknown-port", name, f"{edge}: no port {port!r}", port, known)


def _options(node: Node) -> Iterator[Diagnostic]:
    kernel = KERNELS[node.op]
    known = list(kernel.spec.option_types)
    for option in node.attrs:
        if option not in known:
            yield _fault("unknown-option", node.name, f"no option {option!r}", option, known)
    try:
        kernel.options(node)
    except msgspec.ValidationError as error:
        yield _fault("bad-option", node.name, f"{node.op}: {error}")


def _fault(
    code: str, node: str, message: str, name: str = "", known: Iterable[str] = ()
) -> Diagnostic:
    close = nearest(name, list(known)) if name else None
    hint = f"did you mean {close!r}?" if close else None
    return Diagnostic(code, ("nodes", node), f"{node}: {message}", hint)


def _outlets(graph: Graph) -> dict[str, tuple[str, ...]]:
    ports = {n.name: tuple(p.name for p in KERNELS[n.op].spec.outlets) for n in _known(graph)}
    return {SOURCE: tuple(STEP_INPUTS), **ports}


def _inlets(graph: Graph) -> dict[str, tuple[str, ...]]:
    ports = {n.name: tuple(p.name for p in KERNELS[n.op].spec.inlets) for n in _known(graph)}
    return {SINK: STEP_OUTPUTS, **ports}


def _known(graph: Graph) -> Iterator[Node]:
    return (node for node in graph.nodes if node.op in KERNELS)
