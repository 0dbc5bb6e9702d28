"""A batch is plain if each of its tokens is the largest logit."""

from types import SimpleNamespace

import pytest
from sampled_rows import row

from sagellm.runtime.engine.batch import Batch, step_batch


def batch_of(*sequences):
    batch = Batch()
    for sequence in sequences:
        sequence.lease = SimpleNamespace(tables=[[0]], state_blocks=[])
        batch.add(sequence, sequence.num_pending)
    return step_batch(batch)


@pytest.mark.parametrize("is_bound", [False, True])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_one_row_that_does_not_take_the_largest_logit_is_enough(temperature, is_bound):
    greedy, other = row().answer, row(temperature=temperature).answer
    other.matcher = object() if is_bound else None
    assert batch_of(greedy, other).is_plain == (temperature == 0.0 and not is_bound)
