import pytest

from benchmarks.cells import Cell, Run, cells, rate, whole_run
from benchmarks.machine import Limits
from benchmarks.shape import BYTES_A_TOKEN, prefill_flops

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
    assert LIMITS.of(DECODE) == 10e9 / BYTES_A_TOKEN
    assert LIMITS.of(PREFILL) == pytest.approx(100 / (prefill_flops(100) / 1e11))
    assert LIMITS.of(BATCH) is None


def test_the_shape_is_half_a_billion() -> None:
    assert pytest.approx(0.99e9, rel=0.01) == BYTES_A_TOKEN
