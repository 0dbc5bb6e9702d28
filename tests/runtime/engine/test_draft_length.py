"""Draft lengths: after right and wrong drafts, by price, and after a pause."""

from itertools import pairwise

import pytest

from sagellm.runtime.engine.speculation import Acceptance, DraftLength

CHEAP, DEAR = 0.1, 1.0
HOPE = 0.7


def drafted(length, num_steps, num_right, price=CHEAP):
    """Tokens drafted in each of `num_steps` steps, of which at most `num_right` are right."""
    counts = []
    for _ in range(num_steps):
        count = length.next(price, HOPE)
        counts.append(count)
        if count:
            length.learn(count, min(count, num_right))
    return counts


def test_all_right_keeps_the_longest_draft():
    assert drafted(DraftLength(4), 5, 4) == [4] * 5


def test_wrong_drafts_halve_then_rest_then_try_one_token_ever_more_rarely():
    counts = drafted(DraftLength(4), 600, 0)
    tries = [at for at, count in enumerate(counts) if count]
    assert counts[:3] == [4, 2, 1]
    assert all(counts[at] == 1 for at in tries[3:])
    rests = [after - before - 1 for before, after in pairwise(tries[2:])]
    assert rests == [8, 16, 32, 64, 128, 256]


def test_partly_right_drafts_shrink_to_what_was_right():
    assert drafted(DraftLength(8), 4, 3)[1:] == [3, 4, 3]


def test_a_sequence_that_begins_to_repeat_is_found_out_and_grows_again():
    length = DraftLength(4)
    drafted(length, 60, 0)
    counts = drafted(length, 80, 4)
    assert counts[-5:] == [4] * 5
    first = next(at for at, count in enumerate(counts) if count)
    assert counts[first : first + 3] == [1, 2, 3]


def test_where_a_row_costs_a_token_only_trials_are_made():
    counts = drafted(DraftLength(4), 600, 4, price=DEAR)
    assert sum(counts) == 6


def test_a_higher_price_means_shorter_drafts():
    lengths = [drafted(DraftLength(8), 1, 8, price=price)[0] for price in (0.1, 0.3, 0.6)]
    assert lengths == [6, 3, 1]


@pytest.mark.parametrize(("num_right", "rate"), [(4, 1.0), (0, 0.0), (1, 0.5)])
def test_the_rate_counts_tested_tokens_only(num_right, rate):
    acceptance = Acceptance(1.0)
    for _ in range(2000):
        acceptance.learn(4, num_right)
    assert acceptance.rate(0.5) == pytest.approx(rate, abs=0.01)
