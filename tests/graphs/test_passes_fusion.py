"""The graph after each fusion pass. Tests of the backend compare the logits."""

from collections import Counter
from dataclasses import replace

import pytest

from sagellm.graphs.ir import SINK, Edge, TensorType
from sagellm.graphs.kernels import infer, logits_type, verify
from sagellm.graphs.models import FAMILIES, build
from sagellm.graphs.passes import KERNEL_PASSES, UnknownPass, run_pipeline

SMALL = {
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
NAMES = [step.name for step in KERNEL_PASSES]


def graph_of(architecture="LlamaForCausalLM", **changes):
    return build({"architectures": [architecture], **SMALL, **changes})


def after(name, graph=None):
    return run_pipeline(graph or graph_of(), KERNEL_PASSES, stop_after=name)


def ops(graph):
    return Counter(node.op for node in graph.nodes)


@pytest.mark.parametrize("architecture", FAMILIES)
@pytest.mark.parametrize("name", NAMES)
def test_the_graph_stays_right_after_every_pass(architecture, name):
    graph = after(name, graph_of(architecture))
    assert verify(graph) == ()
    assert logits_type(infer(graph)) == TensorType(("R", 32), "float32")


@pytest.mark.parametrize("architecture", FAMILIES)
@pytest.mark.parametrize("step", KERNEL_PASSES, ids=NAMES)
def test_a_pass_alone_is_right_and_doing_it_twice_changes_nothing(architecture, step):
    graph = step.apply(graph_of(architecture))
    assert verify(graph) == ()
    assert step.apply(graph) == graph


def test_qkv_becomes_one_with_weights_in_order():
    graph = after("fuse_qkv", graph_of("Qwen2ForCausalLM"))
    node = graph.node("layer1_qkv")
    assert ops(graph)["qkv_linear"] == 2
    assert [str(weight)[-13:-7] for weight in node.attrs["weights"]] == [
        "q_proj",
        "k_proj",
        "v_proj",
    ]
    assert [str(bias)[-11:] for bias in node.attrs["biases"]] == [f"{r}_proj.bias" for r in "qkv"]
    assert node.attrs["out_features"] == (16, 8, 8)


def test_qkv_is_found_before_the_norms_of_heads():
    graph = after("fuse_qkv", graph_of("Qwen3ForCausalLM", head_dim=4))
    assert ops(graph)["qkv_linear"] == 2
    assert {edge.outlet for edge in graph.inputs("layer0_q_norm")} == {"q"}


def test_gate_and_up_become_one():
    graph = after("fuse_gate_up")
    assert ops(graph)["gate_up_linear"] == 2
    assert ops(graph)["linear"] == 2 * 2 + 1  # o and down of each layer, the head


def test_an_add_is_fused_with_the_next_norm_and_keeps_its_sum():
    graph = after("fuse_add_norm")
    assert ops(graph)["add_rms_norm"] == 3
    assert ops(graph)["add"] == 1  # the last one goes to the chosen rows
    sums = [edge for edge in graph.outputs("layer0_post_norm") if edge.outlet == "sum"]
    assert len(sums) == 1


def test_silu_and_mul_become_one():
    counts = ops(after("fuse_silu_mul"))
    assert (counts["silu_mul"], counts["silu"], counts["mul"]) == (2, 0, 0)


def test_gate_up_and_their_product_become_one():
    graph = after("fuse_gated_linear", graph_of("LlamaForCausalLM", mlp_bias=True))
    counts, node = ops(graph), graph.node("layer1_gated")
    assert (counts["gated_linear"], counts["gate_up_linear"], counts["silu_mul"]) == (2, 0, 0)
    names = [str(weight).split(".")[-2] for weight in node.attrs["weights"]]
    assert names == ["gate_proj", "up_proj"]
    assert all(node.attrs["biases"])


def test_a_product_of_something_else_is_left_alone():
    before = after("fuse_silu_mul", graph_of(num_hidden_layers=1))
    to_product = [edge for edge in before.edges if edge.target == "layer0_silu_mul"]
    others = [edge for edge in before.edges if edge not in to_product]
    gate, up = to_product
    crossed = replace(gate, inlet=up.inlet), replace(up, inlet=gate.inlet)
    graph = replace(before, edges=(*others, *crossed))
    assert verify(graph) == ()
    (fusion,) = (step for step in KERNEL_PASSES if step.name == "fuse_gated_linear")
    assert fusion.apply(graph) == graph


def test_rope_and_write_become_one_between_the_same_states():
    graph = after("fuse_rope_kv_write")
    node = graph.node("layer1_rope_kv_write")
    (state,) = (edge for edge in graph.inputs(node.name) if edge.inlet == "kv")
    assert ops(graph)["rope"] == ops(graph)["kv_write"] == 0
    assert (state.source, state.outlet) == ("layer0_attention", "kv")
    assert (node.attrs["num_heads"], node.attrs["num_kv_heads"]) == (4, 2)


def test_rotations_that_differ_are_left_alone():
    graph = graph_of(num_hidden_layers=1)
    nodes = [n.with_attrs(theta=5.0) if n.name == "layer0_q_rope" else n for n in graph.nodes]
    fused = run_pipeline(replace(graph, nodes=tuple(nodes)), KERNEL_PASSES)
    assert ops(fused)["rope_kv_write"] == 0


def test_a_linear_with_another_user_is_left_alone():
    graph = graph_of(num_hidden_layers=1)
    edges = [edge for edge in graph.edges if (edge.target, edge.inlet) != (SINK, "logits")]
    shared = replace(graph, edges=(*edges, Edge("layer0_gate_proj", SINK, inlet="logits")))
    assert ops(after("fuse_gate_up", shared))["gate_up_linear"] == 0


def test_stopping_after_a_pass_leaves_the_later_ones_out():
    counts = ops(after("fuse_gate_up"))
    assert counts["qkv_linear"]
    assert not counts["silu_mul"]


def test_an_unknown_pass_gets_the_nearest():
    with pytest.raises(UnknownPass, match="did you mean 'fuse_qkv'"):
        after("fuse_qvk")
