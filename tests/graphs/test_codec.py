"""The JSON and MessagePack forms: their content, and the values that they refuse."""

import json
from dataclasses import replace

import msgspec
import pytest

from sagellm.graphs.diagnostics import GraphError
from sagellm.graphs.ir import Edge, FrozenMap, Graph, Node, TensorType, plain
from sagellm.graphs.text.codec import from_json, from_msgpack, to_json, to_msgpack

BODY = Graph("kernels", "kernel", edges=(Edge("source", "sink", type=TensorType(("T", 8), "f32")),))
GRAPH = Graph("pd", nodes=(Node("prefill", "prefill", FrozenMap({"engine": "p"}), BODY),))


def broken(**changes: object) -> bytes:
    return json.dumps({**plain(GRAPH), **changes}).encode()


def test_json_is_the_plain_form() -> None:
    assert json.loads(to_json(GRAPH)) == plain(GRAPH)
    assert from_json(to_json(GRAPH)) == GRAPH


def test_messagepack_is_the_plain_form() -> None:
    assert msgspec.msgpack.decode(to_msgpack(GRAPH)) == plain(GRAPH)
    assert from_msgpack(to_msgpack(GRAPH)) == GRAPH


def test_a_body_and_the_types_in_it_survive() -> None:
    body = from_json(to_json(GRAPH)).nodes[0].body
    assert body is not None
    assert body.edges[0].type == TensorType(("T", 8), "f32")


@pytest.mark.parametrize(
    ("content", "word"),
    [
        (b"", "truncated"),
        (b"[]", "array"),
        (b"{}", "name"),
        (b"\xff", "malformed"),
        (broken(name=3), r"\$\.name"),
        (broken(extra=1), "extra"),
        (broken(nodes=[{"name": "a"}]), r"\$\.nodes\[0\]"),
        (broken(edges=[{"source": "a"}]), r"\$\.edges\[0\]"),
        (broken(attrs={"x": 2**64}), "64 bits"),
    ],
)
def test_malformed_json_says_where(content: bytes, word: str) -> None:
    with pytest.raises(GraphError, match=word):
        from_json(content)


@pytest.mark.parametrize(
    ("value", "word"),
    [
        (float("nan"), "finite"),
        (float("-inf"), "finite"),
        ({1: 2}, "no text"),
        (b"bytes", "bytes"),
        (msgspec.msgpack.Ext(3, b""), "Ext"),
    ],
)
def test_messagepack_holds_no_more_than_a_graph(value: object, word: str) -> None:
    content = msgspec.msgpack.encode({**plain(GRAPH), "attrs": {"x": [value]}})
    with pytest.raises(GraphError, match=word):
        from_msgpack(content)


def test_what_json_would_change_is_not_written() -> None:
    graph = replace(GRAPH, attrs=FrozenMap({"x": float("nan")}))
    with pytest.raises(GraphError, match="finite"):
        to_json(graph)
    with pytest.raises(GraphError, match="64 bits"):
        to_msgpack(replace(GRAPH, attrs=FrozenMap({"x": 2**80})))
    with pytest.raises(GraphError, match="surrogate"):
        to_json(replace(GRAPH, name="\ud800"))
