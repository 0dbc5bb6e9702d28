"""A batch as the ragged tensors of one forward step."""

from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import torch

from sagellm.backends import StepInputs
from sagellm.runtime.engine.batch import Batch, Scoring

Integers: TypeAlias = npt.NDArray[np.int64]
Blocks: TypeAlias = npt.NDArray[np.int32]


def step_inputs(batch: Batch, block_size: int) -> StepInputs:
    """Rows of logits: those that draw, then those that score.

    Ids of tokens that the step before this one draws are 0: they are filled in when it has.
    """
    query_lens = np.array(batch.query_lens, dtype=np.int64)
    contexts = [
        start + query_len for start, query_len in zip(batch.starts, batch.query_lens, strict=True)
    ]
    ends = np.array(contexts, dtype=np.int64)
    query_starts = np.zeros(len(contexts) + 1, dtype=np.int64)
    np.cumsum(query_lens, out=query_starts[1:])
    owners = np.repeat(np.arange(len(contexts)), query_lens)
    positions = np.arange(len(owners)) + (ends - query_starts[1:])[owners]
    tables = _block_tables(batch, contexts, block_size)
    slots = tables[owners, positions // block_size].astype(np.int64)
    slots = slots * block_size + positions % block_size
    return StepInputs(
        token_ids=torch.from_numpy(_token_ids(batch)),
        positions=torch.from_numpy(positions),
        slots=torch.from_numpy(slots),
        query_starts=torch.from_numpy(query_starts),
        context_lens=torch.from_numpy(ends),
        block_tables=torch.from_numpy(tables),
        logit_rows=torch.from_numpy(_logit_rows(batch, query_starts)),
        query_lens=tuple(batch.query_lens),
        contexts=tuple(contexts),
    )


def _token_ids(batch: Batch) -> Integers:
    if batch.is_behind:
        return np.zeros(len(batch.sequences), dtype=np.int64)
    token_ids: list[int] = []
    for sequence, query_len in zip(batch.sequences, batch.query_lens, strict=True):
        start = sequence.num_computed
        token_ids += sequence.tokens[start : start + query_len]
        if sequence in batch.drafts:
            token_ids += batch.drafts[sequence]
    return np.array(token_ids, dtype=np.int64)


def _block_tables(batch: Batch, contexts: list[int], block_size: int) -> Blocks:
    """[B, M]: M is what the longest context takes; behind a shorter one stands 0."""
    counts = [-(-context // block_size) for context in contexts]
    tables = np.zeros((len(counts), max(counts)), dtype=np.int32)
    for row, sequence, count in zip(tables, batch.sequences, counts, strict=True):
        assert sequence.lease is not None
        row[:count] = sequence.lease.blocks[:count]
    return tables


def _logit_rows(batch: Batch, query_starts: Integers) -> Integers:
    if len(batch.drawing) == len(batch.sequences) and not batch.drafts and not batch.scoring:
        return query_starts[1:] - 1
    drawing, scored = set(batch.drawing), {scoring.sequence: scoring for scoring in batch.scoring}
    draw_rows: list[int] = []
    score_rows: list[int] = []
    for index, sequence in enumerate(batch.sequences):
        end = int(query_starts[index + 1])
        if sequence in drawing:
            draw_rows += range(end - len(batch.drafts.get(sequence, ())) - 1, end)
        if sequence in scored:
            score_rows += _score_rows(scored[sequence], int(query_starts[index]))
    return np.array(draw_rows + score_rows, dtype=np.int64)


def _score_rows(scoring: Scoring, start: int) -> range:
    """Of the tokens before those that are scored; the sequence's first row is `start`."""
    first = start - scoring.sequence.num_computed - 1
    return range(first + scoring.positions.start, first + scoring.positions.stop)
