"""Converts a batch to the ragged arrays that a kernel graph reads."""

from functools import cache

import numpy as np

from sagellm.backends.arrays import BlockIds, Integers
from sagellm.backends.step import StepBatch, StepInputs


def step_inputs(batch: StepBatch, block_size: int) -> StepInputs:
    """The inputs of a step as arrays in host memory. Tokens of `batch.fed` are 0 until `feed`."""
    query_lens = np.array(batch.query_lens, dtype=np.int64)
    ends = np.array(batch.contexts, dtype=np.int64)
    query_starts = np.zeros(len(ends) + 1, dtype=np.int64)
    np.cumsum(query_lens, out=query_starts[1:])
    owners = np.repeat(np.arange(len(ends)), query_lens)  # the sequence of each new token
    # The new tokens are the last tokens of their sequence: their positions end at its context.
    positions = np.arange(len(owners)) + (ends - query_starts[1:])[owners]
    tables = _block_tables(batch, block_size)
    slots = _blocks_at(tables, owners, positions // block_size, len(ends)).astype(np.int64)
    slots = (slots * block_size + positions % block_size).reshape(-1)
    return StepInputs(
        token_ids=np.array(batch.token_ids, dtype=np.int64),
        positions=positions,
        slots=slots,
        query_starts=query_starts,
        context_lens=ends,
        block_tables=tables,
        logit_rows=np.array(batch.logit_rows, dtype=np.int64),
        states=_states(batch),
        query_lens=tuple(batch.query_lens),
        contexts=tuple(batch.contexts),
    )


def _block_tables(batch: StepBatch, block_size: int) -> BlockIds:
    """The block tables as [G * B, M] int32, padded with 0. M: blocks of the longest context."""
    counts = [-(-context // block_size) for context in batch.contexts]
    longest = max(counts)
    counts *= len(batch.block_tables) // len(counts)
    tables = np.zeros((len(counts), longest), dtype=np.int32)
    for row, blocks, count in zip(tables, batch.block_tables, counts, strict=True):
        row[:count] = blocks[:count]
    return tables


def _blocks_at(tables: BlockIds, owners: Integers, at: Integers, count: int) -> BlockIds:
    """The block of each new token in each table: [G, T], or [T] if there is a single table.

    `owners`: the sequence of each token; `at`: its block's index in the table; `count`: B.
    """
    if len(tables) == count:
        return tables[owners, at]
    return tables.reshape(-1, count, tables.shape[1])[:, owners, at]


@cache  # most models have no recurrent state, and a step needs this array each time
def _no_states(count: int) -> BlockIds:
    return np.empty((2, count, 0), dtype=np.int32)


def _states(batch: StepBatch) -> BlockIds:
    """The blocks of recurrent states, [2, B, N] int32: the blocks to read (-1: the state is zeros),
    then the blocks to write. N is 0 for a model without recurrent state.
    """
    if not batch.states:
        return _no_states(len(batch.contexts))
    states = np.full((2, len(batch.contexts), len(batch.states[0][1])), -1, dtype=np.int32)
    for index, (read, written) in enumerate(batch.states):
        states[0, index, : len(read)] = read
        states[1, index] = written
    return states


def feed(batch: StepBatch, inputs: StepInputs, token_ids: list[int]) -> None:
    """Write the tokens of the previous launch (`token_ids`, one per row of that launch) to the
    inputs, and to the batch's rows that wait for them unless the batch is plain.
    """
    if batch.fed:
        places, sources = zip(*batch.fed, strict=True)
        inputs.token_ids[list(places)] = [token_ids[source] for source in sources]
    for row in () if batch.is_plain else batch.rows:
        row.feed(token_ids)
