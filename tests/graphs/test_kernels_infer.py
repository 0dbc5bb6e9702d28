"""Shape and dtype inference over kernel graphs."""

import itertools
from dataclasses import replace

import pytest

from sagellm.graphs.diagnostics import GraphError
from sagellm.graphs.ir import SINK, SOURCE, Edge, Graph, Node, TensorType
from sagellm.graphs.kernels import KV, infer, logits_type

LINEAR = Node("head", "linear").with_attrs(weight="w", in_features=8, out_features=5)
EMBED = Node("embed", "embedding").with_attrs(weight="e", vocab_size=5, size=8, dtype="bfloat16")
THREAD = Edge(SOURCE, SINK, KV, KV)


def chain(*nodes, extra=()):
    """token_ids -> each node's `in` in turn -> logits."""
    names = [node.name for node in nodes]
    edges = [Edge(SOURCE, names[0], "token_ids"), Edge(names[-1], SINK, inlet="logits"), THREAD]
    edges += [Edge(left, right) for left, right in itertools.pairwise(names)]
    return Graph("small", "kernel", nodes, (*edges, *extra))


def test_types_flow_from_inputs_to_logits():
    assert logits_type(infer(chain(EMBED, LINEAR))) == TensorType(("T", 5), "bfloat16")


def test_every_edge_is_typed():
    graph = infer(chain(EMBED, LINEAR))
    assert all(edge.type is not None for edge in graph.edges)
    assert [edge.type for edge in graph.edges if edge.inlet == KV] == [KV]


def test_untyped_graph_has_no_logits_type():
    assert logits_type(chain(EMBED, LINEAR)) is None


def test_selected_rows_change_the_first_dimension():
    rows = Node("rows", "select_rows")
    graph = chain(EMBED, rows, LINEAR, extra=[Edge(SOURCE, "rows", "logit_rows", "rows")])
    assert logits_type(infer(graph)) == TensorType(("R", 5), "bfloat16")


def test_fused_linear_has_a_type_per_outlet():
    fused = Node("gate_up", "gate_up_linear").with_attrs(
        weights=("g", "u"), in_features=8, out_features=(6, 6), biases=(None, None)
    )
    product = Node("product", "silu_mul")
    edges = (
        Edge(SOURCE, "embed", "token_ids"),
        Edge("embed", "gate_up"),
        Edge("gate_up", "product", "gate", "gate"),
        Edge("gate_up", "product", "up", "up"),
        Edge("product", SINK, inlet="logits"),
        THREAD,
    )
    graph = infer(Graph("small", "kernel", (EMBED, fused, product), edges))
    assert logits_type(graph) == TensorType(("T", 6), "bfloat16")


def test_what_is_gated_has_one_outlet_for_two_weights():
    gated = Node("gated", "gated_linear").with_attrs(
        weights=("g", "u"), in_features=8, out_features=(6, 6), biases=(None, None)
    )
    assert logits_type(infer(chain(EMBED, gated))) == TensorType(("T", 6), "bfloat16")


def mismatches():
    norm = Node("norm", "rms_norm").with_attrs(weight="n", size=3, epsilon=1e-6)
    rope = Node("rope", "rope").with_attrs(head_dim=6, theta=1e4)
    places = Edge(SOURCE, "rope", "positions", "positions")
    wide = LINEAR.with_attrs(in_features=9)
    halves = Node("halves", "gated_linear").with_attrs(
        weights=("g", "u"), in_features=8, out_features=(6, 5), biases=(None, None)
    )
    yield "halves", chain(EMBED, halves), "inlets must agree"
    yield "head", chain(EMBED, wide), "last dimension must be 9"
    yield "norm", chain(EMBED, norm), "multiple of 3"
    yield "rope", chain(EMBED, rope, extra=[places]), "whole heads of 6"
    yield "again", chain(EMBED, replace(EMBED, name="again")), "token ids are int64"


@pytest.mark.parametrize(("name", "graph", "message"), [*mismatches()])
def test_disagreeing_shapes_name_the_node(name, graph, message):
    with pytest.raises(GraphError, match=message) as caught:
        infer(graph)
    assert caught.value.diagnostics[0].path == ("nodes", name)


def test_unequal_operands_are_named():
    total = Node("total", "add")
    edges = (
        Edge(SOURCE, "embed", "token_ids"),
        Edge("embed", "head"),
        Edge("embed", "total", inlet="a"),
        Edge("head", "total", inlet="b"),
        Edge("total", SINK, inlet="logits"),
        THREAD,
    )
    with pytest.raises(GraphError, match=r"a bfloat16\[T, 8\], b bfloat16\[T, 5\]"):
        infer(Graph("small", "kernel", (EMBED, LINEAR, total), edges))


def test_a_broken_graph_is_not_inferred():
    with pytest.raises(GraphError, match="no kernel 'linaer'"):
        infer(chain(EMBED, replace(LINEAR, op="linaer")))
