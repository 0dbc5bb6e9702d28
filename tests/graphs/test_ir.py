"""The frozen graph: its values, its order and its hash."""

from itertools import pairwise

import pytest

from sagellm.graphs.ir import Edge, FrozenMap, Graph, Node, TensorType, freeze, thaw


def chain(*names: str) -> Graph:
    edges = tuple(Edge(left, right) for left, right in pairwise(names))
    return Graph("chain", nodes=tuple(Node(name, "map") for name in names), edges=edges)


def test_frozen_maps_are_equal_in_any_order() -> None:
    one, other = FrozenMap({"a": 1, "b": 2}), FrozenMap({"b": 2, "a": 1})
    assert one == other
    assert hash(one) == hash(other)
    assert list(other) == ["b", "a"]
    assert one != FrozenMap({"a": 1})


def test_freezing_and_thawing_are_inverse() -> None:
    plain = {"a": [1, 2.5, {"b": None}], "c": True, "d": "text"}
    frozen = freeze(plain)
    assert isinstance(frozen, FrozenMap)
    assert frozen["a"] == (1, 2.5, FrozenMap({"b": None}))
    assert thaw(frozen) == plain
    assert isinstance(hash(frozen), int)


def test_a_graph_holds_plain_data_only() -> None:
    with pytest.raises(TypeError, match="set is not"):
        freeze({"a": {1, 2}})


def test_with_attrs_adds_to_a_new_node() -> None:
    node = Node("sort", "policy_sort", FrozenMap({"window": 8}))
    changed = node.with_attrs(window=4, weights=[1, 2])
    assert node.attrs == {"window": 8}
    assert changed.attrs == {"window": 4, "weights": (1, 2)}


@pytest.mark.parametrize(
    ("edge", "text"),
    [
        (Edge("a", "b"), "a -> b"),
        (Edge("a", "b", outlet="joint"), "a.joint -> b"),
        (Edge("a", "b", inlet="left"), "a -> b.left"),
        (Edge("a", "b", feedback=True), "a ~> b"),
    ],
)
def test_an_edge_prints_as_it_is_written(edge: Edge, text: str) -> None:
    assert str(edge) == text


def test_a_tensor_type_prints_dtype_and_shape() -> None:
    assert str(TensorType(("T", 64), "bfloat16")) == "bfloat16[T, 64]"


def test_nodes_and_edges_are_found_by_name() -> None:
    graph = chain("a", "b", "c")
    assert graph.node("b").name == "b"
    assert graph.inputs("b") == (Edge("a", "b"),)
    assert graph.outputs("b") == (Edge("b", "c"),)
    assert graph.outputs("b", "joint") == ()
    with pytest.raises(KeyError):
        graph.node("d")


def test_engines_are_empty_unless_given() -> None:
    assert Graph("x").engines == {}
    assert Graph("x", attrs=FrozenMap({"engines": FrozenMap({"p": FrozenMap()})})).engines == {
        "p": {}
    }


def test_topological_order_follows_edges_not_nodes() -> None:
    graph = chain("a", "b", "c")
    turned = Graph("turned", nodes=graph.nodes[::-1], edges=graph.edges)
    assert [node.name for node in turned.topological()] == ["a", "b", "c"]


def test_feedback_does_not_order_but_a_cycle_is_refused() -> None:
    graph = chain("a", "b")
    back = Edge("b", "a", feedback=True)
    assert len(Graph("x", nodes=graph.nodes, edges=(*graph.edges, back)).topological()) == 2
    with pytest.raises(ValueError, match="cycle through a, b"):
        Graph("x", nodes=graph.nodes, edges=(*graph.edges, Edge("b", "a"))).topological()


def golden() -> Graph:
    body = Graph(
        "body",
        "kernel",
        (Node("norm", "rms_norm", FrozenMap({"epsilon": 1e-6})),),
        (Edge("source", "norm", type=TensorType(("T", 64), "float32")),),
    )
    node = Node("prefill", "prefill", FrozenMap({"engine": "p", "max_inflight": 8}), body)
    edges = (Edge("source", "prefill", type="request"), Edge("prefill", "sink", outlet="late"))
    return Graph(
        "pd", "stream", (node,), edges, FrozenMap({"executor": FrozenMap({"kind": "tasks"})})
    )


def test_the_hash_is_the_same_on_every_machine() -> None:
    assert golden().hash == "3cad03702470aa0a"


def test_the_hash_ignores_the_order_of_options() -> None:
    one = Node("a", "x", FrozenMap({"p": 1, "q": FrozenMap({"r": 2, "s": 3})}))
    other = Node("a", "x", FrozenMap({"q": FrozenMap({"s": 3, "r": 2}), "p": 1}))
    assert Graph("g", nodes=(one,)).hash == Graph("g", nodes=(other,)).hash


@pytest.mark.parametrize(
    "changed",
    [
        Graph("other"),
        Graph("g", "kernel"),
        Graph("g", nodes=(Node("a", "x"),)),
        Graph("g", edges=(Edge("a", "b"),)),
        Graph("g", edges=(Edge("a", "b", feedback=True),)),
        Graph("g", edges=(Edge("a", "b", type="request"),)),
        Graph("g", nodes=(Node("a", "x", body=Graph("g")),)),
        Graph("g", attrs=FrozenMap({"a": 1})),
    ],
)
def test_different_graphs_have_different_hashes(changed: Graph) -> None:
    assert changed.hash not in (Graph("g").hash, golden().hash)
