"""Layers in several block tables, and recurrent states, give the same results as one table."""

import pytest
import torch
from tensors import arrays

from sagellm.backends.cpu import CpuBackend
from sagellm.backends.cpu.attention import in_chunks, load, store, token_by_token
from sagellm.backends.cpu.torch_linear import array, tensor
from sagellm.backends.step import KVLayout, StepBatch
from sagellm.backends.step_inputs import step_inputs
from sagellm.graphs.kernels import KVBlocks, kv_groups
from sagellm.graphs.kernels.token_mixers import LinearAttention
from sagellm.graphs.models import build
from sagellm.graphs.passes import PlaceLayers

SIZE, WINDOW = 4, 9  # of the model "qwen2_sliding": layer 0 sees all, 1 and 2 a window
NEW = [[5, 9], [11, 3]]  # of two sequences, in two steps


@pytest.mark.parametrize("native", [True, False], ids=["C", "torch"])
@pytest.mark.parametrize("deterministic", [True, False], ids=["deterministic", "free"])
def test_what_lies_behind_a_window_is_not_read(reference, native, deterministic):
    """Several tables, without the blocks before the window, against one table of all layers."""
    model = reference("qwen2_sliding")
    graph, facts, weights = build(model.config), model.facts, arrays(model.weights)
    blocks = KVBlocks(kv_groups(graph), facts.num_kv_heads, facts.head_dim, SIZE, 4)
    assert blocks.block_layers == 1
    backend, how = CpuBackend(native=native), {"dtype": "float32", "deterministic": deterministic}
    whole, part = model.layout(), KVLayout(1, facts.num_kv_heads, facts.head_dim, SIZE, "float32")
    one = backend.device().lower(graph, weights, layout=whole, **how)
    placed = PlaceLayers(blocks).apply(graph)
    several = backend.device().lower(placed, weights, layout=part, **how)
    pools = [
        array(tensor(backend.device().allocate(layout, count).pool).fill_(float("nan")))
        for layout, count in ((whole, 40), (part, 120))
    ]
    draw = torch.Generator().manual_seed(1)
    numbers = torch.randperm(120, generator=draw).tolist()
    tables = [
        [numbers[(t * 2 + s) * 10 : (t * 2 + s) * 10 + 9] for s in range(2)] for t in range(3)
    ]
    lens = (30, 17)
    contexts = [0, 0]
    for new in (lens, (1, 1), (2, 1)):
        contexts = [context + count for context, count in zip(contexts, new, strict=True)]
        known = [torch.randint(0, 97, (count,), generator=draw).tolist() for count in new]
        batch = {
            "token_ids": [token for tokens in known for token in tokens],
            "query_lens": list(new),
            "contexts": contexts,
            "logit_rows": list(range(sum(new))),
        }
        plain = StepBatch(**batch, block_tables=[[*range(9)], [*range(10, 19)]])
        for sequence, (context, count) in enumerate(zip(contexts, new, strict=True)):
            first = max(0, context - count - WINDOW + 1) // SIZE
            for table in (1, 2):
                tables[table][sequence][:first] = [-1] * first
        split = StepBatch(**batch, block_tables=[blocks for table in tables for blocks in table])
        right = torch.from_numpy(one.run(step_inputs(plain, SIZE), pools[0], 1))
        found = torch.from_numpy(several.run(step_inputs(split, SIZE), pools[1], 1))
        assert torch.equal(found, right)
        assert not right.isnan().any()


def test_products_of_chunks_are_the_recurrence():
    draw = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 150, 3, 8, generator=draw)
    v, state = torch.randn(150, 3, 5, generator=draw), torch.randn(3, 8, 5, generator=draw)
    gate = torch.randn(150, 3, generator=draw) * 3
    given = q, k, v, gate
    (out, end), (right, last) = in_chunks(*given, state), token_by_token(*given, state)
    torch.testing.assert_close(out, right, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(end, last, rtol=1e-4, atol=1e-4)
    begun, middle = token_by_token(*(rows[:70] for rows in given), state)
    rest, end = token_by_token(*(rows[70:] for rows in given), middle)
    assert torch.equal(torch.cat([begun, rest]), right)
    assert torch.equal(end, last)


@pytest.mark.parametrize(("dtype", "count"), [(torch.float32, 2), (torch.bfloat16, 4)])
def test_a_state_keeps_its_bits_in_blocks_of_any_dtype(dtype, count):
    options = LinearAttention(layer=1, num_heads=3, key_dim=8, value_dim=5, num_blocks=count)
    pool = torch.full((2, 2, 9, 2, 4, 8), float("nan"), dtype=dtype)
    state, blocks = torch.randn(3, 8, 5), torch.tensor([7, 0, 5, 2][:count], dtype=torch.int32)
    before = pool.clone()
    store(options, pool, blocks, state)
    assert torch.equal(load(options, pool, blocks), state)
    others = [block for block in range(9) if block not in blocks]
    for layer, kept in ((0, range(9)), (1, others)):
        assert torch.equal(
            pool[layer][:, list(kept)].view(torch.uint8),
            before[layer][:, list(kept)].view(torch.uint8),
        )


def test_before_the_first_token_a_state_is_zero():
    options = LinearAttention(layer=0, num_heads=1, key_dim=2, value_dim=2, num_blocks=1)
    pool = torch.full((1, 2, 3, 1, 4, 8), 7.0)
    assert not load(options, pool, torch.tensor([-1])).any()
