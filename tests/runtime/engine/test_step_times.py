"""The price of a row, in answer tokens, derived from step times."""

import pytest

from sagellm.runtime.engine.speculation import StepTimes


def observed(step_s, rows):
    costs = StepTimes()
    for count in rows:
        costs.observe(count, step_s(count))
    return costs


def price(costs, num_decodes, token_s=0.0):
    """The price in a step of decodes alone, with drafts of at most four tokens."""
    return costs.price(num_decodes, num_decodes, most=5 * num_decodes, token_s=token_s)


def test_rows_that_ride_along_are_cheap():
    costs = observed(lambda rows: 0.02 + 0.0001 * rows, [1, 5, 1, 5])
    assert price(costs, 1) == 0.1


def test_rows_that_cost_what_a_token_costs():
    costs = observed(lambda rows: 0.001 * rows, [32, 64, 48])
    assert price(costs, 32) == pytest.approx(1.0, rel=0.05)


def test_the_same_row_is_dearer_beside_more_sequences():
    costs = observed(lambda rows: 0.01 + 0.001 * rows, range(1, 17))
    assert price(costs, 8) == pytest.approx(8 * 0.001 / 0.018)
    assert price(costs, 1) == 0.1


def test_drafting_itself_has_a_price():
    costs = observed(lambda rows: 0.02, [1, 5])
    assert price(costs, 1, 0.01) == pytest.approx(0.5)


def test_a_frequent_size_counts_no_more_than_a_rare_one():
    costs = observed(lambda rows: 0.01 + 0.001 * rows, [6] + [10] * 500)
    assert price(costs, 8) == pytest.approx(8 * 0.001 / 0.018)


def test_one_late_step_moves_the_mean_little():
    costs = observed(lambda rows: 0.01 + 0.001 * rows, [8, 16] * 8)
    right = price(costs, 8)
    costs.observe(16, 5.0)
    assert price(costs, 8) < 3 * right


@pytest.mark.parametrize("step_s", [0.0, 0.01])
def test_what_is_not_known_is_tried(step_s):
    assert price(StepTimes(), 4) == 0.1
    assert price(observed(lambda rows: step_s, [4]), 4) == 0.1


def test_large_steps_share_their_means():
    costs = observed(lambda rows: 0.001 * rows, range(1, 400))
    assert len(costs._sizes) < 40
    assert price(costs, 200) == pytest.approx(1.0, rel=0.05)
