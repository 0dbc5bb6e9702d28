"""The memory of a kernel graph between steps: groups of layers, and their layout in blocks."""

import pytest

from sagellm.graphs.diagnostics import GraphError
from sagellm.graphs.kernels import KVBlocks, KVGroup, infer, kv_groups
from sagellm.graphs.models import build, facts
from sagellm.graphs.models.decoder import KernelGraphBuilder, NodeOutlet
from sagellm.graphs.passes import KERNEL_PASSES, PlaceLayers, run_pipeline

SMALL = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 176,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
SLIDING = {"use_sliding_window": True, "sliding_window": 9}


def groups_of(architecture, **changes):
    return kv_groups(build({**SMALL, "architectures": [architecture], **changes}))


@pytest.mark.parametrize(
    ("config", "wanted"),
    [
        ({"architecture": "LlamaForCausalLM"}, ["full: layers 0, 1, 2"]),
        (
            {"architecture": "MistralForCausalLM", "sliding_window": 7},
            ["window of 7: layers 0, 1, 2"],
        ),
        ({"architecture": "MistralForCausalLM", "sliding_window": None}, ["full: layers 0, 1, 2"]),
        (
            {"architecture": "Qwen2ForCausalLM", **SLIDING, "max_window_layers": 1},
            ["full: layers 0", "window of 9: layers 1, 2"],
        ),
    ],
)
def test_layers_that_keep_alike_are_one_group(config, wanted):
    assert list(map(str, groups_of(**config))) == wanted


def test_groups_are_the_same_of_a_fused_graph_and_known_as_a_fact():
    config = {**SMALL, "architectures": ["Qwen3ForCausalLM"], **SLIDING, "max_window_layers": 2}
    fused = run_pipeline(build(config), KERNEL_PASSES)
    assert kv_groups(fused) == kv_groups(build(config)) == facts(config).kv_groups


def recurrent(width=6):
    """A graph of one layer with a recurrent state. `width`: of its gate."""
    made = KernelGraphBuilder("recurrent", "float32")
    rows = made.add(
        "embed",
        "embedding",
        {"in": made.step_input("token_ids")},
        weight="e",
        vocab_size=9,
        size=24,
        dtype="float32",
    )
    options = {"weight": "g", "in_features": 24, "out_features": width}
    gate = made.add("gate", "linear", {"in": rows}, **options)
    out = made.add_stateful(
        "mix",
        "linear_attention",
        {"q": rows, "k": rows, "v": rows, "gate": gate},
        ("query_starts", "context_lens", "states"),
        layer=0,
        num_heads=6,
        key_dim=4,
        value_dim=4,
    )
    made.sink("logits", out)
    made.sink("kv", made.state)
    return made.graph


def test_a_recurrent_layer_keeps_a_state():
    graph = infer(recurrent())
    (logits,) = (edge for edge in graph.edges if edge.inlet == "logits")
    assert str(logits.type) == "float32[T, 24]"
    assert kv_groups(graph) == (KVGroup("state", (0,), state_bytes=6 * 4 * 4 * 4),)


def test_a_gate_is_one_number_a_head():
    with pytest.raises(GraphError, match=r"gate is float32.T, 5.; its last dimension must be 6"):
        infer(recurrent(width=5))


def blocks_of(*groups):
    return KVBlocks(groups, num_kv_heads=2, head_dim=8, block_size=4, itemsize=4)


def layers(first, count):
    return tuple(range(first, first + count))


@pytest.mark.parametrize(
    ("counts", "width", "tables"),
    [((28,), 28, [28]), ((2, 10), 2, [1, 5]), ((4, 22), 4, [1, 6]), ((1, 2), 1, [1, 2])],
)
def test_a_block_holds_as_many_layers_as_fill_it(counts, width, tables):
    first = KVGroup("full", layers(0, counts[0]))
    others = [KVGroup("window", layers(counts[0], count), 9) for count in counts[1:]]
    blocks = blocks_of(first, *others)
    assert blocks.block_layers == width
    assert sum(map(blocks.num_tables, blocks.groups)) == sum(tables[1:], 1)
    assert blocks.block_bytes == width * 2 * 2 * 8 * 4 * 4


def test_no_two_layers_lie_in_the_same_place():
    state = KVGroup("state", layers(6, 3), state_bytes=1200)  # three blocks of 512 bytes a layer
    blocks = blocks_of(KVGroup("full", layers(0, 2)), KVGroup("window", layers(2, 4), 9), state)
    assert blocks.block_layers == 2
    assert len({(blocks.table(layer), blocks.row(layer)) for layer in range(6)}) == 6
    places = [
        (part, blocks.row(layer)) for layer in (6, 7, 8) for part in blocks.state_blocks(layer)
    ]
    assert len(set(places)) == len(places) == 9
    assert {part for part, _ in places} == set(range(blocks.num_state_blocks))


def test_placed_kernels_say_their_table_and_the_layer_of_its_blocks():
    config = {**SMALL, "architectures": ["Qwen2ForCausalLM"], **SLIDING, "max_window_layers": 1}
    blocks = KVBlocks(kv_groups(build(config)), 2, 16, 4, 4)
    graph = run_pipeline(PlaceLayers(blocks).apply(build(config)), KERNEL_PASSES)
    placed = [
        f"{node.name}: layer {node.attrs['layer']}, table {node.attrs.get('table', 0)}"
        for node in infer(graph).nodes
        if node.op in ("rope_kv_write", "paged_attention")
    ]
    assert placed == [
        "layer0_rope_kv_write: layer 0, table 0",
        "layer0_attention: layer 0, table 0",
        "layer1_rope_kv_write: layer 0, table 1",
        "layer1_attention: layer 0, table 1",
        "layer2_rope_kv_write: layer 0, table 2",
        "layer2_attention: layer 0, table 2",
    ]


def test_the_states_of_layers_are_placed_in_a_snapshot():
    graph = recurrent()
    blocks = KVBlocks(kv_groups(graph), num_kv_heads=1, head_dim=8, block_size=4, itemsize=2)
    options = PlaceLayers(blocks).apply(graph).node("mix").attrs
    assert (options["layer"], options["first_block"], options["num_blocks"]) == (0, 0, 3)


def test_a_model_of_one_group_is_left_as_it_was():
    graph = build({**SMALL, "architectures": ["LlamaForCausalLM"]})
    assert PlaceLayers(KVBlocks(kv_groups(graph), 2, 16, 4, 4)).apply(graph) == graph


def test_a_layer_that_several_kernels_read_has_the_widest_window():
    made = KernelGraphBuilder("shared", "float32")
    rows = NodeOutlet("embed")
    for name, window in (("a", 5), ("b", None), ("c", 9)):
        made.add_stateful(
            name,
            "paged_attention",
            {"q": rows},
            ("query_starts", "context_lens", "block_tables"),
            layer=0,
            num_heads=1,
            num_kv_heads=1,
            head_dim=8,
            scale=1.0,
            window=window,
        )
    assert kv_groups(made.graph) == (KVGroup("full", (0,)),)
