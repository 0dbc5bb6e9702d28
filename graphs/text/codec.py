"""Encodes graphs, with bodies and types, as JSON or MessagePack, and decodes them."""

import math
from collections.abc import Iterator
from typing import Any

import msgspec

from sagellm.graphs.diagnostics import Diagnostic, GraphError
from sagellm.graphs.ir import Edge, EdgeType, FrozenMap, Graph, Node, TensorType, freeze, plain

MAX_DEPTH = 64  # levels of bodies and options: far above real graphs, far below Python's stack


class _Tensor(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    shape: tuple[int | str, ...]
    dtype: str


class _Edge(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    source: str
    outlet: str
    target: str
    inlet: str
    feedback: bool
    type: _Tensor | str | None


class _Node(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    name: str
    op: str
    attrs: dict[str, Any]
    body: "_Graph | None"


class _Graph(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    name: str
    dialect: str
    attrs: dict[str, Any]
    nodes: tuple[_Node, ...]
    edges: tuple[_Edge, ...]


def to_json(graph: Graph) -> bytes:
    """Encode a graph as indented JSON. Raises GraphError for values that JSON cannot hold."""
    return msgspec.json.format(msgspec.json.encode(_writable(graph)), indent=1)


def from_json(content: bytes) -> Graph:
    """Decode the JSON of a graph. Raises GraphError for any other content."""
    return _decoded(content, _JSON)


def to_msgpack(graph: Graph) -> bytes:
    """Encode a graph as MessagePack. Raises GraphError for values that MessagePack cannot hold."""
    return msgspec.msgpack.encode(_writable(graph))


def from_msgpack(content: bytes) -> Graph:
    """Decode the MessagePack of a graph. Raises GraphError for any other content."""
    return _decoded(content, _MSGPACK)


_JSON = msgspec.json.Decoder(_Graph)
_MSGPACK = msgspec.msgpack.Decoder(_Graph)


def _writable(graph: Graph) -> dict[str, object]:
    encoded = plain(graph)
    _refuse(_odd_values(encoded, 0))
    return encoded


def _decoded(
    content: bytes, decoder: "msgspec.json.Decoder[_Graph] | msgspec.msgpack.Decoder[_Graph]"
) -> Graph:
    try:
        read = decoder.decode(content)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:  # covers ValidationError
        raise _malformed(str(error)) from None
    except RecursionError:
        raise _malformed(f"nested deeper than {MAX_DEPTH} levels") from None
    _refuse(_odd_graph(read, 0))
    return _graph(read)


def _refuse(oddities: Iterator[str]) -> None:
    for oddity in oddities:
        raise _malformed(oddity)


def _malformed(message: str) -> GraphError:
    hint = "write the file anew from its graph"
    return GraphError((Diagnostic("malformed", (), f"not a graph: {message}", hint),))


def _odd_graph(graph: _Graph, depth: int) -> Iterator[str]:
    """Describe the values that the records accept but a graph cannot hold."""
    yield from _odd_values(graph.attrs, depth)
    for node in graph.nodes:
        yield from _odd_values(node.attrs, depth + 1)
        if node.body is not None:
            yield from _odd_graph(node.body, depth + 1)


def _odd_values(value: object, depth: int) -> Iterator[str]:
    if depth > MAX_DEPTH:
        yield f"nested deeper than {MAX_DEPTH} levels"
    elif isinstance(value, dict):
        yield from (f"a key that is no text: {key!r}" for key in value if not isinstance(key, str))
        yield from (odd for item in value.values() for odd in _odd_values(item, depth + 1))
    elif isinstance(value, list):
        yield from (odd for item in value for odd in _odd_values(item, depth + 1))
    elif isinstance(value, float) and not math.isfinite(value):
        yield f"{value} is no finite number"
    elif isinstance(value, int) and not -(2**63) <= value < 2**63:  # too large for MessagePack
        yield f"{value} does not fit 64 bits"
    # UTF-8 cannot encode half a surrogate pair, which a JSON escape can produce.
    elif isinstance(value, str) and any("\ud800" <= letter <= "\udfff" for letter in value):
        yield "half a surrogate pair is no text"
    elif not isinstance(value, bool | int | float | str | None):
        yield f"a value of type {type(value).__name__}"


def _graph(read: _Graph) -> Graph:
    nodes = tuple(map(_node, read.nodes))
    return Graph(read.name, read.dialect, nodes, tuple(map(_edge, read.edges)), _attrs(read.attrs))


def _node(read: _Node) -> Node:
    return Node(read.name, read.op, _attrs(read.attrs), _graph(read.body) if read.body else None)


def _edge(read: _Edge) -> Edge:
    ends = (read.source, read.target, read.outlet, read.inlet)
    return Edge(*ends, read.feedback, _type(read.type))


def _type(read: _Tensor | str | None) -> EdgeType | None:
    return TensorType(read.shape, read.dtype) if isinstance(read, _Tensor) else read


def _attrs(read: dict[str, Any]) -> FrozenMap:
    return FrozenMap((name, freeze(value)) for name, value in read.items())
