"""The cells of a calibration, and which of their periods count."""

import pytest

from sagellm.calibration.measuring import Cells, MeasuredPeriod, Measurement, Sizes, powers

SIZES = Sizes(longest=256, num_tokens=2048, step_tokens=64, max_num_seqs=8, vocab_size=50)


def all_cells(sizes=SIZES, seed=0):
    cells = Cells(sizes, seed)
    return [*cells.warm_up(), *cells.round(), cells.mixed(0.01), cells.burst()]


@pytest.mark.parametrize(
    "sizes",
    [SIZES, Sizes(2, 32, 8, 1, 2), Sizes(4096, 32_768, 512, 64, 300), Sizes(64, 64, 4096, 64, 9)],
)
def test_every_request_fits_the_engine(sizes):
    for planned in (one for cell in all_cells(sizes) for one in cell):
        assert len(planned.prompt) >= 1
        assert planned.output_len >= 1
        assert len(planned.prompt) + planned.output_len <= sizes.longest
        assert all(0 <= token < sizes.vocab_size for token in planned.prompt)


def test_a_warm_up_writes_the_whole_pool():
    num_tokens = sum(len(one.prompt) + 1 for cell in Cells(SIZES, 0).warm_up() for one in cell)
    assert num_tokens >= SIZES.num_tokens


def test_a_batch_decodes_together_for_some_steps():
    """Its answers are longer than its prompts take to compute."""
    batches = [cell for cell in Cells(SIZES, 0).round() if len(cell) == SIZES.max_num_seqs]
    assert batches
    for cell in batches:
        num_steps = sum(len(one.prompt) for one in cell) / SIZES.step_tokens
        assert cell[0].output_len >= num_steps + 15


def test_a_burst_fills_every_slot():
    assert len(Cells(SIZES, 0).burst()) > SIZES.max_num_seqs


def test_some_prompts_of_a_mixed_load_begin_alike():
    prompts = [one.prompt for one in Cells(SIZES, 0).mixed(0.01)]
    starts = [prompt[:4] for prompt in prompts if len(prompt) >= 4]
    assert len(set(starts)) < len(starts)


def test_equal_seeds_give_equal_cells():
    assert all_cells() == all_cells()
    assert all_cells(seed=1) != all_cells()


def test_powers_end_with_the_largest():
    assert list(powers(8, 40)) == [8, 16, 32, 40]
    assert list(powers(8, 8)) == [8]
    assert list(powers(16, 300, 4)) == [16, 64, 256, 300]


def period(others, seconds=1.0):
    return MeasuredPeriod([], [], others, seconds)


def test_disturbed_periods_do_not_count():
    found = Measurement([period(0.01), period(0.5), period(0.02)])
    assert found.quiet == [period(0.01), period(0.02)]
    assert found.quiet_s == 2.0
    assert found.others == pytest.approx(0.015)


def test_all_periods_count_where_hardly_any_is_quiet():
    periods = [period(0.01), period(0.5, seconds=9.0)]
    assert Measurement(periods).quiet == periods
    assert Measurement(periods).quiet_s == 1.0
