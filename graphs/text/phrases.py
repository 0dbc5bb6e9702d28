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
    outlet = "" if edge.outlet == "out" else edge.outlet
    inlet = "" if edge.inlet in ("in", edge.outlet) else f"> {edge.inlet}"
    kind = "" if edge.type is None else str(edge.type)
    return " ".join(part for part in (outlet, inlet, kind) if part)


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
