"""The weights that a kernel graph reads, and the shapes that its kernels need."""

from collections.abc import Callable, Mapping

from sagellm.graphs.ir import Graph, Value

Shape = tuple[int, ...]


def weight_shapes(graph: Graph) -> dict[str, Shape]:
    """Shape by tensor name, of an unfused kernel graph, in the order of its nodes."""
    found: dict[str, Shape] = {}
    for node in graph.nodes:
        found |= _READS.get(node.op, _nothing)(node.attrs)
    return found


def linear_weights(graph: Graph) -> frozenset[str]:
    """The weights of the graph's linears: those that a folder may store quantised."""
    return frozenset(str(node.attrs["weight"]) for node in graph.nodes if node.op == "linear")


def _nothing(options: Mapping[str, Value]) -> dict[str, Shape]:
    return {}


def _linear(options: Mapping[str, Value]) -> dict[str, Shape]:
    size, width = _whole(options["out_features"]), _whole(options["in_features"])
    bias = options.get("bias")
    biases = {bias: (size,)} if isinstance(bias, str) else {}
    return {str(options["weight"]): (size, width), **biases}


def _embedding(options: Mapping[str, Value]) -> dict[str, Shape]:
    shape = _whole(options["vocab_size"]), _whole(options["size"])
    return {str(options["weight"]): shape}


def _norm(options: Mapping[str, Value]) -> dict[str, Shape]:
    return {str(options["weight"]): (_whole(options["size"]),)}


def _whole(value: Value) -> int:
    assert isinstance(value, int)
    return value


_READS: dict[str, Callable[[Mapping[str, Value]], dict[str, Shape]]] = {
    "embedding": _embedding,
    "linear": _linear,
    "rms_norm": _norm,
}
