"""The rules of kernel graphs: each breach is found once, with its node."""

from dataclasses import replace

import pytest

from sagellm.graphs.ir import SINK, SOURCE, Edge, Node
from sagellm.graphs.kernels import KERNEL_VOCABULARY, KERNELS, verify
from sagellm.graphs.models import build

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
GRAPH = build(CONFIG)


def with_node(name, **changes):
    return replace(
        GRAPH, nodes=tuple(replace(n, **changes) if n.name == name else n for n in GRAPH.nodes)
    )


def with_edges(keep=lambda edge: True, more=()):
    return replace(GRAPH, edges=(*filter(keep, GRAPH.edges), *more))


def breaches():
    head = GRAPH.node("lm_head")
    yield "unknown-kernel", "lm_head", with_node("lm_head", op="linera")
    yield "unknown-option", "lm_head", with_node("lm_head", attrs=head.with_attrs(wieght=1).attrs)
    yield "bad-option", "lm_head", with_node("lm_head", attrs=head.with_attrs(weight=1).attrs)
    yield "bad-option", "lm_head", with_node("lm_head", attrs=Node("x", "linear").attrs)
    yield "duplicate-node", "embed", replace(GRAPH, nodes=(*GRAPH.nodes, GRAPH.node("embed")))
    yield "unknown-port", SOURCE, with_edges(more=[Edge(SOURCE, "lm_head", "positons", "in")])
    yield "unknown-port", "embed", with_edges(more=[Edge("embed", SINK, "ouy", "logits")])
    yield "unfed-inlet", "final_norm", with_edges(lambda edge: edge.target != "final_norm")
    yield "unfed-inlet", "embed", with_edges(more=[Edge(SOURCE, "embed", "positions")])
    yield "unfed-inlet", SINK, with_edges(lambda edge: edge.inlet != "logits")
    yield "dangling-outlet", "lm_head", with_edges(lambda edge: edge.source != "lm_head")
    yield "state-shared", SOURCE, with_edges(more=[Edge(SOURCE, "layer1_kv_write", "kv", "kv")])
    yield "state-mixed", "embed", with_edges(more=[Edge("layer1_attention", "embed", "kv", "in")])


@pytest.mark.parametrize(("code", "node", "graph"), [*breaches()])
def test_a_breach_is_found_at_its_node(code, node, graph):
    assert (code, ("nodes", node)) in [(found.code, found.path) for found in verify(graph)]


def test_a_built_graph_is_clean():
    assert verify(GRAPH) == ()


def test_a_cycle_is_found():
    graph = with_edges(
        lambda edge: edge.target != "layer0_input_norm",
        [Edge("layer1_mlp_add", "layer0_input_norm")],
    )
    assert "cycle" in [found.code for found in verify(graph)]


def test_a_slip_of_the_hand_is_answered_with_the_near_name():
    (found,) = verify(with_node("lm_head", op="linera"))
    assert found.hint == "did you mean 'linear'?"


def test_every_kernel_is_in_the_vocabulary_under_its_own_name():
    assert {name: spec.name for name, spec in KERNEL_VOCABULARY.items()} == {n: n for n in KERNELS}
    assert {spec.role for spec in KERNEL_VOCABULARY.values()} == {"kernel"}
