"""Kernel graphs of models that embed: their kernels, fusions, weights, and refused configs."""

from typing import Any

import pytest

from sagellm.graphs.diagnostics import GraphError, UnsupportedModel
from sagellm.graphs.ir import SINK, SOURCE, Edge, Graph, Node
from sagellm.graphs.kernels import infer, verify
from sagellm.graphs.kernels.memory_layout import weight_shapes
from sagellm.graphs.models import EmbeddingHead, build, check, facts
from sagellm.graphs.passes import KERNEL_PASSES, run_pipeline

BERT: dict[str, Any] = {
    "architectures": ["BertModel"],
    "vocab_size": 100,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 40,
    "type_vocab_size": 2,
}
QWEN: dict[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"],
    "vocab_size": 100,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
}
CLS = EmbeddingHead("cls")


def ops(graph: Graph) -> list[str]:
    return [node.op for node in graph.topological()]


def test_an_encoder_has_vectors_of_the_hidden_size_for_each_sequence() -> None:
    graph = infer(build(BERT, CLS))
    (result,) = graph.inputs(SINK)
    assert (result.inlet, str(result.type)) == ("vectors", "float32[B, 32]")
    assert facts(BERT, CLS).max_model_len == 40


def test_fusions_leave_five_products_and_norms_a_layer() -> None:
    fused = infer(run_pipeline(build(BERT, CLS), KERNEL_PASSES))
    layer = [
        *("qkv_linear", "packed_attention", "linear", "add_layer_norm"),
        *("gelu_linear", "linear", "add_layer_norm"),
    ]
    first = ["embedding", "embedding", "embedding", "add", "add_layer_norm"]
    assert ops(fused) == [*first, *layer, *layer, "pool", "unit_norm"]


def test_positions_of_roberta_begin_after_that_of_padding() -> None:
    config = {**BERT, "architectures": ["XLMRobertaModel"], "pad_token_id": 1}
    graph = build(config, CLS)
    assert graph.node("position_embed").attrs["first"] == 2
    assert facts(config, CLS).max_model_len == 38


@pytest.mark.parametrize(
    ("config", "prefix", "expected"),
    [
        (BERT, "", "encoder.layer.1.output.dense.bias"),
        (BERT, "bert.", "bert.encoder.layer.1.output.dense.bias"),
        (QWEN, "", "layers.0.self_attn.q_proj.weight"),
        (QWEN, "model.", "model.layers.0.self_attn.q_proj.weight"),
        ({**QWEN, "architectures": ["Qwen3Model"]}, "", "norm.weight"),
    ],
)
def test_weights_have_the_names_of_the_folder(
    config: dict[str, Any], prefix: str, expected: str
) -> None:
    shapes = weight_shapes(build(config, EmbeddingHead("last", prefix=prefix)))
    assert expected in shapes
    assert all(name.startswith(prefix) for name in shapes)


def test_a_decoder_that_embeds_has_no_kv_pool_and_no_logits() -> None:
    graph = infer(build(QWEN, EmbeddingHead("last", is_unit=False)))
    assert {edge.inlet for edge in graph.inputs(SINK)} == {"vectors"}
    assert "kv_write" not in ops(graph)
    assert "unit_norm" not in ops(graph)
    assert graph.node("layer0_attention").attrs["causal"] is True


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"hidden_act": "relu"}, "hidden_act"),
        ({"position_embedding_type": "relative_key"}, "position_embedding_type"),
        ({"is_decoder": True}, "is_decoder"),
        ({"num_attention_heads": 5}, "num_attention_heads"),
        ({"embedding_size": 16}, "embedding_size"),
        ({"architectures": ["T5Model"]}, "architectures"),
        ({"architectures": []}, "architectures"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "quantization_config"),
        ({"architectures": ["RobertaModel"], "pad_token_id": 60}, "max_position_embeddings"),
    ],
)
def test_what_would_be_computed_wrongly_is_refused(changes: dict[str, Any], field: str) -> None:
    with pytest.raises(UnsupportedModel) as caught:
        check({**BERT, **changes}, CLS)
    assert caught.value.field == field


def test_an_encoder_does_not_generate() -> None:
    with pytest.raises(UnsupportedModel, match="kind: embedding"):
        build(BERT)


def attention(**options: Any) -> Graph:
    embed = {"weight": "e", "vocab_size": 5, "size": 8, "dtype": "float32"}
    heads = {"num_heads": 2, "num_kv_heads": 2, "head_dim": 4, "scale": 1.0, **options}
    nodes = (
        Node("embed", "embedding").with_attrs(**embed),
        Node("mix", "packed_attention").with_attrs(**heads),
        Node("pool", "pool").with_attrs(mode="mean"),
    )
    edges = (
        Edge(SOURCE, "embed", "token_ids"),
        *(Edge("embed", "mix", inlet=inlet) for inlet in ("q", "k", "v")),
        Edge(SOURCE, "mix", "query_starts", "query_starts"),
        Edge("mix", "pool"),
        Edge(SOURCE, "pool", "query_starts", "query_starts"),
        Edge("pool", SINK, inlet="vectors"),
    )
    return Graph("g", "kernel", nodes, edges)


def test_a_graph_with_vectors_needs_no_logits() -> None:
    assert verify(attention()) == ()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"head_dim": 8}, "must be 16"),
        ({"num_heads": 4, "head_dim": 2, "num_kv_heads": 3}, "must be 6"),
        ({"window": 3}, "only causal attention has a window"),
    ],
)
def test_attention_refuses_widths_that_do_not_fit(options: dict[str, Any], says: str) -> None:
    with pytest.raises(GraphError, match=says):
        infer(attention(**options))
