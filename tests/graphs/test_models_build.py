"""From config.json to a kernel graph: what each family does, and what is refused."""

from collections import Counter

import pytest

from sagellm.graphs.ir import TensorType
from sagellm.graphs.kernels import infer, logits_type, verify
from sagellm.graphs.models import FAMILIES, UnsupportedModel, build, facts

SMALL = {
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "dtype": "bfloat16",
}


def config(architecture="LlamaForCausalLM", **changes):
    return {"architectures": [architecture], **SMALL, **changes}


def ops(graph):
    return Counter(node.op for node in graph.nodes)


def attrs(graph, name):
    return graph.node(name).attrs


@pytest.mark.parametrize("architecture", FAMILIES)
def test_every_family_builds_a_graph_that_types(architecture):
    graph = build(config(architecture))
    assert verify(graph) == ()
    assert logits_type(infer(graph)) == TensorType(("R", 32), "bfloat16")


def test_a_layer_of_llama():
    counts = ops(build(config(num_hidden_layers=1)))
    assert counts["linear"] == 8  # q k v o gate up down, and the head
    assert counts["rms_norm"] == 3
    assert counts["rope"] == 2
    assert counts["paged_attention"] == counts["kv_write"] == 1


def test_weights_have_the_names_of_hugging_face():
    graph = build(config())
    weight = "model.layers.1.self_attn.q_proj.weight"
    assert attrs(graph, "layer1_q_proj")["weight"] == weight
    assert attrs(graph, "lm_head")["weight"] == "lm_head.weight"


def test_tied_embeddings_share_one_weight():
    graph = build(config(tie_word_embeddings=True))
    assert attrs(graph, "lm_head")["weight"] == attrs(graph, "embed")["weight"]


def test_qwen2_has_biases_on_queries_keys_and_values_alone():
    biased = [n.name for n in build(config("Qwen2ForCausalLM")).nodes if n.attrs.get("bias")]
    assert biased == [f"layer{layer}_{role}_proj" for layer in (0, 1) for role in "qkv"]


def test_qwen3_normalises_heads_of_its_own_head_dim():
    graph = build(config("Qwen3ForCausalLM", head_dim=6))
    assert attrs(graph, "layer0_k_norm")["size"] == 6
    assert attrs(graph, "layer0_q_proj")["out_features"] == 24


def windows(**changes):
    graph = build(config(**changes))
    return [node.attrs["window"] for node in graph.nodes if node.op == "paged_attention"]


@pytest.mark.parametrize(
    ("changes", "wanted"),
    [
        ({"architecture": "MistralForCausalLM", "sliding_window": 7}, [7, 7]),
        ({"architecture": "MistralForCausalLM", "sliding_window": None}, [None, None]),
        ({"architecture": "MistralForCausalLM"}, [4096, 4096]),
        ({"architecture": "Qwen2ForCausalLM", "sliding_window": 7}, [None, None]),
        (
            {
                "architecture": "Qwen2ForCausalLM",
                "use_sliding_window": True,
                "sliding_window": 7,
                "max_window_layers": 1,
            },
            [None, 7],
        ),
        (
            {
                "architecture": "Qwen3ForCausalLM",
                "use_sliding_window": True,
                "sliding_window": 7,
                "layer_types": ["sliding_attention", "full_attention"],
            },
            [7, None],
        ),
    ],
)
def test_sliding_windows_by_layer(changes, wanted):
    assert windows(**changes) == wanted


LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}


def test_both_spellings_of_rope_and_dtype_say_the_same():
    old = config(rope_theta=5e5, rope_scaling=LLAMA3, torch_dtype="bfloat16", dtype=None)
    new = config(rope_parameters={"rope_theta": 5e5, **LLAMA3})
    assert build(old).hash == build(new).hash
    assert attrs(build(new), "layer0_q_rope")["theta"] == 5e5


def test_rope_scaling_counts_where_rope_parameters_are_given_too():
    both = {"rope_scaling": LLAMA3, "rope_parameters": {"rope_type": "linear", "factor": 2.0}}
    assert attrs(build(config(**both)), "layer0_q_rope")["scaling"] == "llama3"
    both["rope_scaling"] = {}
    assert attrs(build(config(**both)), "layer0_q_rope")["scaling"] == "linear"


def test_linear_rope_scaling_of_old_configs():
    graph = build(config(rope_scaling={"type": "linear", "factor": 2.0}))
    assert attrs(graph, "layer0_k_rope")["scaling"] == "linear"


REFUSED = [
    ("rope_scaling", {"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}),
    ("factor", {"rope_scaling": {"rope_type": "linear"}}),
    ("rope_parameters", {"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}),
    ("factor", {"rope_scaling": {"rope_type": "linear", "factor": 0}}),
    ("factor", {"rope_scaling": {**LLAMA3, "factor": -8.0}}),
    ("factor", {"rope_scaling": {**LLAMA3, "factor": float("inf")}}),
    ("rope_theta", {"rope_theta": float("nan")}),
    ("rope_theta", {"rope_theta": 10**400}),
    ("high_freq_factor", {"rope_scaling": {**LLAMA3, "high_freq_factor": 1.0}}),
    ("partial_rotary_factor", {"rope_parameters": {"partial_rotary_factor": 0.5}}),
    ("hidden_act", {"hidden_act": "gelu"}),
    ("quantization_config", {"quantization_config": {"quant_method": "gptq"}}),
    ("compression_config", {"compression_config": {"quant_method": "compressed-tensors"}}),
    ("auto_map", {"auto_map": {"AutoModel": "x.Y"}}),
    ("sliding_window", {"layer_types": ["full_attention", "sliding_attention"]}),
    ("layer_types", {"architecture": "Qwen2ForCausalLM", "layer_types": ["linear_attention"] * 2}),
    ("layer_types", {"architecture": "Qwen2ForCausalLM", "layer_types": ["full_attention"]}),
    ("head_dim", {"head_dim": 5}),
    ("num_attention_heads", {"num_attention_heads": 3, "num_key_value_heads": 3}),
    ("num_key_value_heads", {"num_key_value_heads": 3}),
    ("vocab_size", {"vocab_size": None}),
    ("hidden_size", {"hidden_size": "16"}),
    ("dtype", {"dtype": "float8_e4m3fn"}),
    ("tie_word_embeddings", {"tie_word_embeddings": "yes"}),
    ("rms_norm_eps", {"rms_norm_eps": "small"}),
]


@pytest.mark.parametrize(("field", "changes"), REFUSED)
def test_what_would_change_the_result_is_refused_by_field(field, changes):
    with pytest.raises(UnsupportedModel, match=field) as caught:
        build(config(**changes))
    assert caught.value.field == field
    assert caught.value.fix


def test_an_unknown_architecture_is_never_taken_for_the_nearest():
    with pytest.raises(UnsupportedModel, match=r"Qwen3MoeForCausalLM is not built.* one of Llama"):
        build(config("Qwen3MoeForCausalLM"))


def test_no_architecture_at_all():
    with pytest.raises(UnsupportedModel, match="architectures"):
        build({})


def test_facts_without_torch():
    found = facts(config("MistralForCausalLM", sliding_window=7, eos_token_id=[1, 2]))
    assert (found.family, found.num_layers, found.head_dim) == ("mistral", 2, 4)
    assert (found.sliding_window, found.max_model_len, found.dtype) == (7, 64, "bfloat16")
    assert found.eos_token_ids == (1, 2)
    assert facts(config()).eos_token_ids == ()


def test_end_tokens_outside_the_vocabulary_are_left_out():
    assert facts(config(eos_token_id=[-1, 0, 31, 32])).eos_token_ids == (0, 31)


@pytest.mark.parametrize("token", ["</s>", True, [1, False]])
def test_a_wrong_eos_is_refused(token):
    with pytest.raises(UnsupportedModel, match="eos_token_id"):
        facts(config(eos_token_id=token))
