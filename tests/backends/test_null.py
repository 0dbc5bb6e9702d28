"""The backend that computes nothing still checks graphs and gives logits their shape."""

from dataclasses import replace

import pytest
import torch

from sagellm.backends import KVLayout, StepInputs, get_backend
from sagellm.graphs.diagnostics import GraphError
from sagellm.graphs.models import build

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
}
LAYOUT = KVLayout(num_layers=1, num_kv_heads=4, head_dim=4, block_size=16, dtype="bfloat16")
OPTIONS = {"layout": LAYOUT, "dtype": "bfloat16", "deterministic": False}


def one_token():
    one, zero = torch.ones(1, dtype=torch.int64), torch.zeros(1, dtype=torch.int64)
    table = torch.zeros(1, 1, dtype=torch.int32)
    return StepInputs(zero, zero, zero, torch.tensor([0, 1]), one, table, zero, (1,), (1,))


def test_logits_have_the_shape_of_the_graph():
    backend = get_backend("null")
    program = backend.lower(build(CONFIG), {}, **OPTIONS)
    logits = program.run(one_token(), backend.allocate_pool(LAYOUT, 4))
    assert logits.shape == (1, 32)
    assert not logits.any()


def test_a_pool_of_any_size_takes_no_memory():
    pool = get_backend("null").allocate_pool(LAYOUT, 10**8)
    assert pool.shape == (1, 2, 10**8, 4, 16, 4)
    assert pool.device.type == "meta"


def test_a_broken_graph_is_refused():
    graph = build(CONFIG)
    with pytest.raises(GraphError):
        get_backend("null").lower(replace(graph, edges=graph.edges[1:]), {}, **OPTIONS)
