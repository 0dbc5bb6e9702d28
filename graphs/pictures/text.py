"""A graph as text: one line a node, in an order in which it can run."""

from collections.abc import Iterator

from sagellm.graphs.ir import SINK, Edge, Graph, Node, Value, thaw


def to_text(graph: Graph) -> str:
    """The whole graph; equal graphs give equal text. Nodes that hold a body show it indented."""
    return "\n".join(_graph(graph, "")) + "\n"


def _graph(graph: Graph, indent: str) -> Iterator[str]:
    yield f"{indent}{graph.dialect} graph {graph.name}  # {graph.hash}"
    for name, value in graph.attrs.items():
        yield f"{indent}  {name}: {_value(value)}"
    for node in graph.topological():
        yield f"{indent}  {_node(graph, node)}"
        if node.body is not None:
            yield from _graph(node.body, indent + "    ")
    yield f"{indent}  {SINK} <- {_inlets(graph, SINK)}"


def _node(graph: Graph, node: Node) -> str:
    """`name = op(option=value) <- inlet: source.outlet type, ...`"""
    options = ", ".join(f"{name}={_value(value)}" for name, value in node.attrs.items())
    return f"{node.name} = {node.op}({options}) <- {_inlets(graph, node.name)}"


def _inlets(graph: Graph, name: str) -> str:
    return ", ".join(_fed(edge) for edge in graph.inputs(name)) or "nothing"


def _fed(edge: Edge) -> str:
    inlet = "" if edge.inlet == "in" else f"{edge.inlet}: "
    outlet = "" if edge.outlet == "out" else f".{edge.outlet}"
    carried = "" if edge.type is None else f" {edge.type}"
    feedback = "~" if edge.feedback else ""
    return f"{inlet}{feedback}{edge.source}{outlet}{carried}"


def _value(value: Value) -> str:
    plain = thaw(value)
    return f"{plain}" if not isinstance(plain, dict) else _mapping(plain)


def _mapping(plain: dict[str, object]) -> str:
    shown = (f"{k}: {_mapping(v) if isinstance(v, dict) else v}" for k, v in plain.items())
    return f"{{{', '.join(shown)}}}"
