import pytest

from benchmarks.shape import LLAMA15M, QWEN05, QWEN05_2L


def test_a_token_reads_all_weights() -> None:
    assert pytest.approx(0.99e9, rel=0.01) == QWEN05.bytes_a_token
    assert pytest.approx(15e6, rel=0.05) == LLAMA15M.num_weights


def test_keys_and_values_of_a_token() -> None:
    assert QWEN05.kv_bytes_a_token == 24 * 2 * 128 * 2
    assert LLAMA15M.kv_width == LLAMA15M.hidden
    assert QWEN05_2L.kv_bytes_a_token * 12 == QWEN05.kv_bytes_a_token


def test_attention_makes_long_prompts_dearer() -> None:
    assert QWEN05.prefill_flops(2048) > 4.1 * QWEN05.prefill_flops(512)
    assert QWEN05.decode_flops(8192) > QWEN05.decode_flops(128)
