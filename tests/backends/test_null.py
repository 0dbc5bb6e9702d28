"""The null backend checks graphs, and samples tokens by (seed, choice, position)."""

from dataclasses import replace

import pytest

from sagellm.backends import KVLayout, LogitsRow, StepBatch, get_backend
from sagellm.backends.null import null_token
from sagellm.graphs.diagnostics import GraphError
from sagellm.graphs.models import build
from sagellm.runtime.engine.output import Mailbox
from sagellm.runtime.engine.sequence import Sequence
from sagellm.runtime.messages import SequenceState
from sagellm.runtime.sampling import Sampling

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


def answer():
    state = SequenceState(
        owner="o", request_id="r", choice=3, prompt_token_ids=(5,), sampling=Sampling(seed=7)
    )
    mailbox, stop_ids = Mailbox(lambda: None), frozenset[int]()
    return Sequence(
        state, arrival=1, mailbox=mailbox, max_output=9, stop_ids=stop_ids, output_text=None
    )


def test_a_launch_is_over_at_once_and_samples_what_seed_choice_and_position_say():
    device = get_backend("null").device()
    program = device.lower(build(CONFIG), {}, **OPTIONS)
    batch = StepBatch([5], [1], [1], [[0]], [0], rows=[LogitsRow(answer(), 1)])
    ticket = device.open_queue().launch(program, device.allocate(LAYOUT, 4), batch)
    assert ticket.result(timeout=0).token_ids == [null_token(7, 3, 0, 32)]


def test_a_pool_of_any_size_takes_no_memory():
    pool = get_backend("null").device().allocate(LAYOUT, 10**8)
    assert (pool.layout, pool.num_blocks) == (LAYOUT, 10**8)
    assert pool.read([slice(0, 10**8)], range(1)) == []


def test_a_broken_graph_is_refused():
    graph = build(CONFIG)
    with pytest.raises(GraphError):
        get_backend("null").device().lower(replace(graph, edges=graph.edges[1:]), {}, **OPTIONS)
