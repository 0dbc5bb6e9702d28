import pytest

from benchmarks.cells import Cell, Run, cells, rate, whole_run
from benchmarks.machine import Limits
from benchmarks.shape import LLAMA15M, QWEN05

PREFILL, DECODE, BATCH = (Cell("c", kind, 2, 100, 11) for kind in ("prefill", "decode", "batch"))
LIMITS = Limits(read_bytes_per_s=10e9, fp32_flops_per_s=1e11, bf16_flops_per_s=2e10)


@pytest.mark.parametrize(("cell", "expected"), [(PREFILL, 100.0), (DECODE, 5.0), (BATCH, 5.5)])
def test_what_each_kind_counts(cell: Cell, expected: float) -> None:
    assert rate(cell, Run(first_s=2.0, total_s=4.0, num_measured=11)) == expected


def test_a_whole_run_is_what_was_measured() -> None:
    assert whole_run([1.0, 2.0, 3.0], 3) == Run(1.0, 3.0, 3)


def test_a_run_cut_short_goes_on_like_its_last_half() -> None:
    steps = [10.0, 11.0, 12.0, 14.0, 16.0]
    assert whole_run(steps, 7) == Run(10.0, 20.0, 5)


def test_prompts_differ_by_round_and_repeat_by_name() -> None:
    (cell, *_) = cells(4)
    assert cell.prompts(0) == cell.prompts(0)
    assert cell.prompts(0) != cell.prompts(1)
    assert [len(prompt) for prompt in cell.prompts(0)] == [512]


def test_decoding_is_bound_by_reading_and_prefill_by_arithmetic() -> None:
    few = Cell("c", "decode", 1, 100, 11)
    read = QWEN05.bytes_a_token + 105 * QWEN05.kv_bytes_a_token
    assert LIMITS.of(few) == pytest.approx(10e9 / read)
    assert LIMITS.of(PREFILL) == pytest.approx(100 / (QWEN05.prefill_flops(100) / 1e11))


def test_many_sequences_are_bound_by_arithmetic_and_pay_for_their_prefill() -> None:
    many = Cell("c", "batch", 32, 128, 128)
    prefill_s = 32 * QWEN05.prefill_flops(128) / 1e11
    decode_s = sum(32 * QWEN05.decode_flops(length) for length in range(129, 256)) / 1e11
    assert LIMITS.of(many) == pytest.approx(32 * 128 / (prefill_s + decode_s))


def test_time_to_the_first_token_is_in_milliseconds() -> None:
    cell = Cell("c", "ttft", 1, 128, 1)
    assert LIMITS.of(cell, LLAMA15M) == pytest.approx(1e3 * LLAMA15M.prefill_flops(128) / 1e11)


def test_quantised_weights_are_read_faster_and_their_arithmetic_is_not_known() -> None:
    few = Cell("c", "decode", 1, 100, 11)
    whole, quantised = LIMITS.of(few), LIMITS.of(few, bytes_a_weight=1.0)
    assert whole is not None
    assert quantised == pytest.approx(2 * whole, rel=0.01)
    assert LIMITS.of(PREFILL, bytes_a_weight=1.0) is None
    assert LIMITS.of(BATCH, bytes_a_weight=0.5) is None


def test_start_and_memory_have_no_limit() -> None:
    assert LIMITS.of(Cell("c", "start", 1, 128, 1)) is None
