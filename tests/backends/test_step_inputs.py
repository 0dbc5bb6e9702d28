"""The inputs of a program are those that the kernel dialect declares, for any batch."""

import dataclasses

import numpy as np

from sagellm.backends import StepBatch, StepInputs
from sagellm.backends.step_inputs import feed, step_inputs
from sagellm.graphs.ir import TensorType
from sagellm.graphs.kernels import STEP_INPUTS

BLOCK_SIZE = 4
BATCH = StepBatch(
    token_ids=[7, 8, 9, 0],
    query_lens=[3, 1],
    contexts=[6, 3],
    block_tables=[[5, 2, 9], [1]],
    logit_rows=[2, 3],
    fed=[(3, 1)],
)


def test_inputs_are_those_that_the_dialect_declares() -> None:
    inputs = step_inputs(BATCH, BLOCK_SIZE)
    declared = {name: kind for name, kind in STEP_INPUTS.items() if isinstance(kind, TensorType)}
    sizes = {"T": 4, "B": 2, "B+1": 3, "M": 2, "R": 2, "2": 2, "N": 0}
    for name, kind in declared.items():
        tensor = getattr(inputs, name)
        if name == "token_types":  # only of a batch to embed
            assert tensor is None
            continue
        assert str(tensor.dtype) == kind.dtype, name
        assert tuple(tensor.shape) == tuple(sizes[str(size)] for size in kind.shape), name
    of_the_host = {"query_lens", "contexts"}
    fields = {field.name for field in dataclasses.fields(StepInputs)}
    assert fields == {*declared, *of_the_host}


def test_positions_and_slots_follow_from_contexts_and_blocks() -> None:
    inputs = step_inputs(BATCH, BLOCK_SIZE)
    assert inputs.positions.tolist() == [3, 4, 5, 2]
    assert inputs.slots.tolist() == [5 * 4 + 3, 2 * 4, 2 * 4 + 1, 1 * 4 + 2]
    assert inputs.block_tables.tolist() == [[5, 2], [1, 0]]
    assert inputs.query_starts.tolist() == [0, 3, 4]


def test_tokens_of_the_launch_before_are_filled_in() -> None:
    inputs = step_inputs(BATCH, BLOCK_SIZE)
    feed(BATCH, inputs, [40, 41])
    assert np.array_equal(inputs.token_ids, [7, 8, 9, 41])
