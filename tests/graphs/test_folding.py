"""Repeated layers of any period are found; the shown layer keeps the edges of all."""

import pytest

from sagellm.graphs.ir import Edge, FrozenMap, Graph, Node
from sagellm.graphs.kernels import infer
from sagellm.graphs.models import FAMILIES, build
from sagellm.graphs.passes import KERNEL_PASSES, run_pipeline
from sagellm.graphs.text.draw import as_text
from sagellm.graphs.text.folding import Repeat, fold

SMALL = {
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "dtype": "bfloat16",
}
SLIDING, FULL = "sliding_attention", "full_attention"


def layered(architecture: str = "LlamaForCausalLM", **changes: object) -> Graph:
    return infer(build({"architectures": [architecture], **SMALL, **changes}))


def windowed(*types: str) -> Graph:
    changes = {"num_hidden_layers": len(types), "layer_types": list(types), "sliding_window": 8}
    return layered("Qwen3ForCausalLM", use_sliding_window=True, **changes)


def titles(graph: Graph, **options: bool) -> list[str]:
    return [repeat.title for repeat in fold(graph, **options).members]


@pytest.mark.parametrize("architecture", FAMILIES)
def test_the_layers_of_every_family_are_one(architecture: str) -> None:
    graph = layered(architecture)
    assert titles(graph) == ["layers 0-5: x 6"]
    assert len(fold(graph).graph.nodes) == len(graph.nodes) - 5 * len(members(graph))


def members(graph: Graph) -> tuple[str, ...]:
    (names,) = fold(graph).members.values()
    return names


def test_fused_across_layers_the_first_and_the_last_differ() -> None:
    graph = infer(run_pipeline(layered(), KERNEL_PASSES))
    assert titles(graph) == ["layer 0", "layers 1-4: x 4", "layer 5"]


def test_layers_in_two_groups_are_two() -> None:
    assert titles(windowed(FULL, FULL, SLIDING, SLIDING)) == ["layers 0-1: x 2", "layers 2-3: x 2"]


def test_layers_in_turn_are_one_repeat_of_several() -> None:
    graph = windowed(*(SLIDING, SLIDING, FULL) * 2, SLIDING)
    assert titles(graph) == ["layers 0-5: 3 layers x 2", "layer 6"]
    first = next(iter(fold(graph).members.values()))
    assert {"layer0_attention", "layer1_attention", "layer2_attention"} < set(first)


def test_unfolded_every_layer_is_there() -> None:
    graph = layered()
    whole = fold(graph, unfold=True)
    assert titles(graph, unfold=True) == [f"layer {n}" for n in range(6)]
    assert whole.graph == graph


def test_edges_of_hidden_layers_leave_the_shown_one() -> None:
    graph = fold(layered()).graph
    assert [edge.target for edge in graph.outputs("layer0_mlp_add")] == ["logit_rows"]
    assert Edge("layer0_attention", "sink", "kv", "kv", type="kv") in graph.edges
    assert all(edge.source in (*graph.names, "source") for edge in graph.edges)
    assert len(set(graph.edges)) == len(graph.edges)


def layer(number: int, **attrs: object) -> Node:
    return Node(f"layer{number}_norm", "rms_norm", FrozenMap()).with_attrs(**attrs)


def test_an_option_that_differs_keeps_layers_apart() -> None:
    nodes = (layer(0, epsilon=1e-5), layer(1, epsilon=1e-5), layer(2, epsilon=1e-6))
    assert titles(Graph("k", "kernel", nodes)) == ["layers 0-1: x 2", "layer 2"]


def test_numbers_that_are_not_the_layers_keep_them_apart() -> None:
    nodes = tuple(layer(n, weight=f"model.layers.{n}.w") for n in range(2))
    assert titles(Graph("k", "kernel", nodes)) == ["layers 0-1: x 2"]
    nodes = tuple(layer(n, weight=f"model.layers.{n + 1}.w") for n in range(2))
    assert titles(Graph("k", "kernel", nodes)) == ["layer 0", "layer 1"]


def test_layers_with_a_gap_are_not_one_row() -> None:
    assert titles(Graph("k", "kernel", (layer(0), layer(2)))) == ["layer 0", "layer 2"]


def test_a_graph_without_layers_stays_as_it_is() -> None:
    graph = Graph("k", "kernel", (Node("norm", "rms_norm"),))
    assert fold(graph).graph == graph
    assert Repeat(3, 3).title == "layer 3"


@pytest.mark.parametrize("architecture", FAMILIES)
@pytest.mark.parametrize("unfold", [False, True])
def test_text_has_each_heading_once_and_each_kernel_under_it(
    architecture: str, unfold: bool
) -> None:
    graph = layered(architecture)
    lines = as_text(graph, unfold=unfold).splitlines()
    headings = [line.strip() for line in lines if line.startswith("  layer")]
    folded = ["layers 0-5: x 6 (layer 0 is shown)"]
    assert headings == ([f"layer {n}" for n in range(6)] if unfold else folded)
    listed = [line.split()[0] for line in lines if line.startswith("    layer")]
    assert len(listed) == len(members(graph)) * (6 if unfold else 1)
