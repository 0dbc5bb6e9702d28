"""Sampled tokens that count: right drafts and one more, up to a row that is not finite."""

import pytest

from sagellm.backends import Sampled
from sagellm.runtime.engine.batch import Batch, rows_of
from sagellm.runtime.engine.output import Mailbox
from sagellm.runtime.engine.sequence import Sequence
from sagellm.runtime.engine.speculation import verified
from sagellm.runtime.messages import SequenceState


def sequence(*prompt, num_computed=0):
    state = SequenceState(owner="o", request_id="r", prompt_token_ids=prompt)
    made = Sequence(
        state,
        arrival=1,
        mailbox=Mailbox(lambda: None),
        max_output=9,
        stop_ids=frozenset(),
        output_text=None,
    )
    made.num_computed = num_computed
    return made


def batch_of(*drafts):
    batch = Batch()
    for index, guesses in enumerate(drafts):
        batch.add(sequence(1, 2, 3, num_computed=2), 1)
        batch.num_decodes += 1
        batch.add_drafts(index, guesses)
    return batch


@pytest.mark.parametrize(
    ("drafts", "sampled", "num_rows"),
    [
        ([], [7], 1),
        ([7, 8], [7, 8, 9], 3),
        ([7, 8], [7, 5, 9], 2),
        ([7, 8], [6, 8, 9], 1),
    ],
)
def test_the_first_token_that_was_not_foreseen_is_the_last(drafts, sampled, num_rows):
    [(_, rows, is_broken)] = verified(batch_of(drafts), Sampled(sampled))
    assert rows == range(num_rows)
    assert not is_broken


def test_each_sequence_has_its_own_rows():
    found = verified(batch_of([7], [], [8, 9]), Sampled([7, 1, 2, 8, 4, 4]))
    assert [rows for _, rows, _ in found] == [range(2), range(2, 3), range(3, 5)]


@pytest.mark.parametrize(
    ("broken", "num_rows", "is_broken"), [(0, 0, True), (1, 1, True), (2, 2, False)]
)
def test_a_broken_row_fails_only_who_gets_there(broken, num_rows, is_broken):
    sampled = Sampled([7, 5, 9, 4], broken=frozenset({broken}))
    found = list(verified(batch_of([7, 8], []), sampled))
    assert found[0][1:] == (range(num_rows), is_broken)
    assert found[1][1:] == (range(3, 4), False)


def test_the_rows_of_a_batch_are_the_sequence_as_it_would_be():
    batch = batch_of([7, 8])
    rows = rows_of(batch)
    assert [row.num_output for row in rows] == [0, 1, 2]
    assert [row.tokens for row in rows] == [[1, 2, 3], [1, 2, 3, 7], [1, 2, 3, 7, 8]]
    assert [row.output for row in rows] == [[], [7], [7, 8]]
    assert batch.num_tokens == 3
