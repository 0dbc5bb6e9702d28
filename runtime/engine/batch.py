"""A batch: the sequences of one step, and the numbers that a device is given for them."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import accumulate
from types import MappingProxyType
from typing import NamedTuple

import trio

from sagellm.backends import LogitsRow, Scored, StepBatch, Ticket
from sagellm.backends.step import NO_SOURCE
from sagellm.runtime.engine.sequence import Sequence
from sagellm.runtime.kv.lease import Fence, Lease

# Prompt tokens scored in one step at most: a row of logits is as wide as the vocabulary, so that
# those of a whole prompt would take gigabytes.
SCORED_ROWS = 64


class Scoring(NamedTuple):
    """Positions of a prompt whose logprobs a step gives."""

    sequence: Sequence
    positions: range


@dataclass(slots=True)
class Batch:
    """One step: `query_lens[i]` new tokens of `sequences[i]`, the next pending ones of each, which
    are those from `starts[i]` on.

    `sampling` are those that have nothing pending after this step, and so sample a token; `scoring`
    says of which prompt tokens logprobs are wanted. The first `num_decodes` sequences have one
    pending token, the one they sampled last; the step before may still be sampling it. `drafts` are
    guesses of what some of those sample next, computed after it and counted in its query length.
    """

    sequences: list[Sequence] = field(default_factory=list)
    query_lens: list[int] = field(default_factory=list)
    starts: list[int] = field(default_factory=list)
    sampling: list[Sequence] = field(default_factory=list)
    scoring: list[Scoring] = field(default_factory=list)
    num_decodes: int = 0
    drafts: dict[Sequence, list[int]] = field(default_factory=dict)
    begun: tuple[int, ...] = ()  # tokens of each that count as under way

    def add(self, sequence: Sequence, query_len: int) -> None:
        self.sequences.append(sequence)
        self.query_lens.append(query_len)
        self.starts.append(sequence.num_scheduled)
        if query_len == sequence.num_pending:
            self.sampling.append(sequence)
        positions = sequence.unscored(query_len)
        if positions:
            self.scoring.append(Scoring(sequence, positions))

    def guess(self, index: int, drafts: list[int]) -> None:
        """Compute drafts after the pending token of a decode; its lease reaches that far."""
        if drafts:
            self.drafts[self.sequences[index]] = drafts
            self.query_lens[index] += len(drafts)

    def begin(self) -> None:
        """Count its tokens as under way, but for drafts: the next batch is made as if they were
        computed, and nobody takes their blocks.
        """
        self.begun = tuple(self.query_lens)
        for sequence, query_len in zip(self.sequences, self.begun, strict=True):
            sequence.num_launched += query_len
        for sequence in self.sampling:
            sequence.num_sampling += 1

    def end(self) -> None:
        """The step is over, or was recalled."""
        for sequence, query_len in zip(self.sequences, self.begun, strict=True):
            sequence.num_launched -= query_len
        for sequence in self.sampling:
            sequence.num_sampling -= 1

    @property
    def decodes(self) -> list[Sequence]:
        return self.sequences[: self.num_decodes]

    @property
    def is_decoding(self) -> bool:
        """Whether no prompt is computed."""
        return self.num_decodes == len(self.sequences)

    @property
    def row_sequences(self) -> list[Sequence]:
        """The sequence of each token that is sampled: one of each, and one more for each draft."""
        return [
            sequence
            for sequence in self.sampling
            for _ in range(1 + len(self.drafts.get(sequence, ())))
        ]

    @property
    def num_answer_tokens(self) -> int:
        """Tokens of answers that are computed, one after the other or again."""
        steps = zip(self.sequences, self.starts, self.query_lens, strict=True)
        return sum(count for sequence, start, count in steps if start >= sequence.num_prompt)

    @property
    def num_tokens(self) -> int:
        return sum(self.query_lens)


@dataclass(slots=True, eq=False)
class Reservation:
    """Somebody who waits for blocks that another pool will fill."""

    fence: Fence
    num_tokens: int
    arrival: int
    granted: trio.Event = field(default_factory=trio.Event)
    lease: Lease | None = None


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


def rows_of(
    batch: Batch, sources: Mapping[Sequence, int] = MappingProxyType({})
) -> list[LogitsRow]:
    """What is sampled: a token for each sampling sequence, and one more after each of its drafts.

    Sampling after a draft depends on the tokens before it and on its position, as it would in a
    step of its own. `sources`: the rows of the step before, by sequence.
    """
    found = []
    for sequence in batch.sampling:
        num_known = len(sequence.tokens)
        found.append(LogitsRow(sequence, num_known, (), sources.get(sequence, NO_SOURCE)))
        if batch.drafts:
            drafts = tuple(batch.drafts.get(sequence, ()))
            found += [
                LogitsRow(sequence, num_known, drafts[: size + 1]) for size in range(len(drafts))
            ]
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
