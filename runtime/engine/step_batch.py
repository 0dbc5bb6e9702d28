"""A batch of sequences as the numbers that a device is given."""

from collections.abc import Mapping
from itertools import accumulate
from types import MappingProxyType

from sagellm.backends import Row, Scored, StepBatch, Ticket
from sagellm.backends.row import NO_SOURCE
from sagellm.runtime.engine.batch import Batch, Scoring
from sagellm.runtime.engine.sequence import Sequence


def step_batch(batch: Batch, before: Batch | None = None, after: Ticket | None = None) -> StepBatch:
    """`before` is the batch of the ticket `after`, which may still be computing: what it samples is
    fed to this one on the device.
    """
    sources = {sequence: row for row, sequence in enumerate(before.sampling)} if before else {}
    token_ids: list[int] = []
    fed: list[tuple[int, int]] = []
    steps = zip(batch.sequences, batch.starts, batch.query_lens, strict=True)
    for sequence, start, query_len in steps:
        known = sequence.tokens[start : start + query_len]
        if not known:  # the step before samples it
            fed.append((len(token_ids), sources[sequence]))
            known.append(0)
        token_ids += known
        if batch.drafts:
            token_ids += batch.drafts.get(sequence, ())
    contexts = [start + count for start, count in zip(batch.starts, batch.query_lens, strict=True)]
    return StepBatch(
        token_ids=token_ids,
        query_lens=batch.query_lens,
        contexts=contexts,
        block_tables=_block_tables(batch),
        logit_rows=_logit_rows(batch),
        rows=rows_of(batch, sources),
        scored=[_scored(scoring) for scoring in batch.scoring],
        fed=fed,
        states=_states(batch),
        after=after if fed else None,
    )


def _block_tables(batch: Batch) -> list[list[int]]:
    """The first table of all sequences, then the second."""
    tables = [sequence.lease.tables for sequence in batch.sequences if sequence.lease]
    if len(tables[0]) == 1:  # most models
        return [table for (table,) in tables]
    return [table for alike in zip(*tables, strict=True) for table in alike]


def _states(batch: Batch) -> list[tuple[list[int], list[int]]]:
    """Where each sequence's recurrent state is read and written, of models that have some."""
    leases = [sequence.lease for sequence in batch.sequences if sequence.lease]
    if not leases[0].snapshot:
        return []
    steps = zip(leases, batch.starts, strict=True)
    return [(lease.state_at(start), lease.snapshot) for lease, start in steps]


def rows_of(batch: Batch, sources: Mapping[Sequence, int] = MappingProxyType({})) -> list[Row]:
    """What is sampled: a token for each sampling sequence, and one more after each of its drafts.

    Sampling after a draft depends on the tokens before it and on its position, as it would in a
    step of its own. `sources`: the rows of the step before, by sequence.
    """
    found = []
    for sequence in batch.sampling:
        num_known = len(sequence.tokens)
        found.append(Row(sequence, num_known, (), sources.get(sequence, NO_SOURCE)))
        if batch.drafts:
            drafts = tuple(batch.drafts.get(sequence, ()))
            found += [Row(sequence, num_known, drafts[: size + 1]) for size in range(len(drafts))]
    return found


def _logit_rows(batch: Batch) -> list[int]:
    """Which of the new tokens need logits: first where tokens are sampled, then where some are
    scored.
    """
    ends = list(accumulate(batch.query_lens))
    if len(batch.sampling) == len(ends) and not batch.drafts and not batch.scoring:
        return [end - 1 for end in ends]
    sampling, scored = set(batch.sampling), {one.sequence: one for one in batch.scoring}
    sample_rows: list[int] = []
    score_rows: list[int] = []
    steps = zip(batch.sequences, batch.starts, batch.query_lens, ends, strict=True)
    for sequence, start, query_len, end in steps:
        if sequence in sampling:
            sample_rows += range(end - len(batch.drafts.get(sequence, ())) - 1, end)
        if sequence in scored:
            # A token's logits are those of the token before it.
            first = end - query_len - start - 1
            positions = scored[sequence].positions
            score_rows += range(first + positions.start, first + positions.stop)
    return sample_rows + score_rows


def _scored(scoring: Scoring) -> Scored:
    sequence, positions = scoring
    token_ids = sequence.tokens[positions.start : positions.stop]
    return Scored(token_ids, sequence.state.sampling.prompt_logprobs or 0)
