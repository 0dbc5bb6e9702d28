"""The benchmark of keys and values in 8 bits, on a small shape."""

from dataclasses import replace

import pytest

from benchmarks import kv_cache, weights
from benchmarks.shape import ONE_LAYER
from sagellm.backends.cpu.attention import dequantised
from sagellm.backends.cpu.torch_linear import tensor


def test_a_line_a_cell_and_the_tokens_of_a_gib(monkeypatch, tmp_path):
    monkeypatch.setattr(weights, "cache_folder", lambda: tmp_path)
    monkeypatch.setattr(kv_cache, "CELLS", ((1, 32), (2, 16)))
    shape = replace(ONE_LAYER, name="small", vocab_size=64, hidden=32, num_heads=2, num_kv_heads=2)
    lines = kv_cache.measured(shape, rounds=2, threads=1)
    assert [line.split("|")[1:3] for line in lines[2:4]] == [[" 1 ", " 32 "], [" 2 ", " 16 "]]
    assert lines[4] == f"bfloat16: 128 bytes a token, {2**30 // 128} tokens a GiB"
    assert lines[5] == f"int8: 72 bytes a token, {2**30 // 72} tokens a GiB"


def test_pools_hold_random_numbers():
    device = kv_cache.CpuBackend().device()
    layout = kv_cache.KVLayout(2, 2, 8, 16, "int8")
    pool = kv_cache._filled(device, layout, 3)
    numbers = dequantised(tensor(pool))
    assert numbers.shape == (2, 2, 3, 2, 16, 8)
    assert numbers.std() == pytest.approx(1, abs=0.1)
