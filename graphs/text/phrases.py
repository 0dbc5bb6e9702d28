"""How drawings say options, ports, types and bodies in few letters."""

from collections import Counter
from collections.abc import Iterator, Mapping

from sagellm.graphs.ir import SOURCE, Edge, Graph, Node, Value
from sagellm.graphs.text.writing import flow, scalar


def told_options(options: Mapping[str, Value]) -> Iterator[str]:
    """Each option as `name: value`."""
    return (f"{scalar(name)}: {flow(value)}" for name, value in options.items())


def port_label(edge: Edge) -> str:
    """What an edge says of itself: ports that are not the usual ones, and its type."""
    kind = "" if edge.type is None else str(edge.type)
    return " ".join(part for part in (ports(edge), kind) if part)


def ports(edge: Edge) -> str:
    """The ports of an edge that are not the usual ones; an inlet after `>` beside an outlet."""
    outlet = "" if edge.outlet == "out" else edge.outlet
    inlet = "" if edge.inlet in ("in", edge.outlet) else edge.inlet
    return " > ".join(port for port in (outlet, inlet) if port)


def outlet_types(graph: Graph, node: Node) -> Iterator[str]:
    """What a kernel gives, an outlet each: `float32[T, 64]`, `q float32[T, 64]`."""
    kinds = {edge.outlet: str(edge.type) for edge in graph.outputs(node.name) if edge.type}
    for outlet, kind in kinds.items():
        if kind != outlet:
            yield kind if outlet == "out" else f"{outlet} {kind}"


def entry_inlets(graph: Graph, node: Node) -> list[str]:
    """What a kernel takes from `source`."""
    if graph.dialect != "kernel":
        return []
    return [edge.outlet for edge in graph.inputs(node.name) if edge.source == SOURCE]


def told_body(body: Graph) -> str:
    """A body in one line: its name, its size and its commonest ops."""
    counts = Counter(node.op for node in body.nodes).most_common(4)
    ops = ", ".join(f"{count} {op}" for op, count in counts)
    return f"body {body.name}: {len(body.nodes)} nodes ({ops}), hash {body.hash}"
