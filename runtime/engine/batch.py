"""A batch: the sequences of one step, and the numbers that a device gets for them."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import accumulate
from types import MappingProxyType
from typing import NamedTuple

import trio

from sagellm.backends import LogitsRow, Scored, StepBatch, Ticket
from sagellm.backends.step import NO_SOURCE
from sagellm.runtime.engine.options import Limits
from sagellm.runtime.engine.sequence import Sequence
from sagellm.runtime.engine.token_budget import decode_budget, share_budget
from sagellm.runtime.kv.lease import Fence, Lease

# Prompt tokens scored in one step at most: a row of logits is as wide as the vocabulary, so the
# rows of a whole prompt would take gigabytes.
SCORED_ROWS = 64


@dataclass(slots=True, eq=False)
class Reservation:
    """A request for blocks that a transfer from another pool will fill.

    `granted` is set once `lease` is assigned. If the engine stops first, `granted` is set and
    `lease` stays None.
    """

    fence: Fence
    num_tokens: int
    arrival: int
    granted: trio.Event = field(default_factory=trio.Event)
    lease: Lease | None = None


class Scoring(NamedTuple):
    """The positions of one prompt whose prompt logprobs a step computes."""

    sequence: Sequence
    positions: range


@dataclass(slots=True)
class Batch:
    """One step: `query_lens[i]` pending tokens of `sequences[i]`, from position `starts[i]` on.

    `sampling`: the sequences that sample a token, because no token is pending after this step.
    `scoring`: the prompt positions whose logprobs are wanted. Each of the first `num_decodes`
    sequences computes one pending token, its last sampled token, which the previous step may still
    be sampling. `drafts`: the guessed tokens of some decodes; they are computed after the pending
    token, and counted in `query_lens`.
    """

    sequences: list[Sequence] = field(default_factory=list)
    query_lens: list[int] = field(default_factory=list)
    starts: list[int] = field(default_factory=list)
    sampling: list[Sequence] = field(default_factory=list)
    scoring: list[Scoring] = field(default_factory=list)
    num_decodes: int = 0
    drafts: dict[Sequence, list[int]] = field(default_factory=dict)
    begun: tuple[int, ...] = ()  # by sequence: the tokens that `begin` has counted as launched

    def add_decodes(self, decodes: list[Sequence]) -> None:
        """Add decodes to an empty batch, one token each."""
        self.sequences = decodes
        self.query_lens = [1] * len(decodes)
        self.starts = [sequence.num_scheduled for sequence in decodes]
        self.sampling = list(decodes)
        self.num_decodes = len(decodes)

    def add(self, sequence: Sequence, query_len: int) -> None:
        """Add the next `query_len` pending tokens of a sequence."""
        self.sequences.append(sequence)
        self.query_lens.append(query_len)
        self.starts.append(sequence.num_scheduled)
        if query_len == sequence.num_pending:
            self.sampling.append(sequence)
        positions = sequence.unscored(query_len)
        if positions:
            self.scoring.append(Scoring(sequence, positions))

    def add_drafts(self, index: int, drafts: list[int]) -> None:
        """Append drafts to the pending token of the decode at `index`. Its lease must have room for
        the drafts.
        """
        if drafts:
            self.drafts[self.sequences[index]] = drafts
            self.query_lens[index] += len(drafts)

    def begin(self) -> None:
        """Count the tokens of the batch as launched. The next batch is then scheduled as if they
        were computed, and their blocks are not freed. Drafts are added later, and do not count.
        """
        self.begun = tuple(self.query_lens)
        for sequence, query_len in zip(self.sequences, self.begun, strict=True):
            sequence.num_launched += query_len
        for sequence in self.sampling:
            sequence.num_sampling += 1

    def end(self) -> None:
        """Undo `begin`, after the step has ended or was cancelled."""
        for sequence, query_len in zip(self.sequences, self.begun, strict=True):
            sequence.num_launched -= query_len
        for sequence in self.sampling:
            sequence.num_sampling -= 1

    @property
    def decodes(self) -> list[Sequence]:
        return self.sequences[: self.num_decodes]

    @property
    def is_decoding(self) -> bool:
        """Whether the batch computes no prompt."""
        return self.num_decodes == len(self.sequences)

    @property
    def row_sequences(self) -> list[Sequence]:
        """The sequence of each sampled row: one row for each sampling sequence, and one more for
        each of its drafts.
        """
        return [
            sequence
            for sequence in self.sampling
            for _ in range(1 + len(self.drafts.get(sequence, ())))
        ]

    @property
    def num_tokens(self) -> int:
        return sum(self.query_lens)


class TokenBudget:
    """Fills batches with at most `limits.max_num_batched_tokens` tokens.

    `boundary`: the block size, if the pool keeps recurrent states at the ends of blocks; else None.
    """

    def __init__(self, limits: Limits, boundary: int | None) -> None:
        self._limits = limits
        self._boundary = boundary
        self._sat_out = False  # whether the first prefill in rank got nothing in the previous step
        self._sat_out_before = False  # `_sat_out` before the latest `share`
        self._scored: dict[Sequence, int] = {}  # the most tokens of scored prompts in this step

    def share(self, decodes: list[Sequence], prefills: list[Sequence]) -> Batch:
        """Fill a batch with one token of each decode, and with chunks of prefills.

        Decodes past the budget are left out. If there are prefills, they get at least a quarter of
        the budget.
        """
        self._sat_out_before = self._sat_out
        batch, budget = Batch(), self._limits.max_num_batched_tokens
        prefills = self._share_scoring(prefills)
        batch.add_decodes(decodes[: decode_budget(budget, has_prefills=bool(prefills))])
        if prefills:
            shares, self._sat_out = share_budget(
                prefills, budget - batch.num_decodes, self._chunk, sat_out=self._sat_out
            )
            for sequence, count in shares:
                batch.add(sequence, count)
        return batch

    def undo(self) -> None:
        """Take back the latest `share`, whose batch is not computed."""
        self._sat_out = self._sat_out_before

    def _share_scoring(self, prefills: list[Sequence]) -> list[Sequence]:
        """Divide SCORED_ROWS among scored prompts in rank order. Return the prefills that may
        compute in this step.
        """
        self._scored, room = {}, SCORED_ROWS
        scoring = [sequence for sequence in prefills if sequence.is_scoring]
        for sequence in sorted(scoring, key=lambda scoring: scoring.rank):
            self._scored[sequence] = min(room, sequence.num_pending)
            room -= self._scored[sequence]
        return [sequence for sequence in prefills if self._scored.get(sequence) != 0]

    def _chunk(self, sequence: Sequence, budget: int) -> int:
        most = self._scored.get(sequence, budget)
        chunk = min(sequence.num_pending, self._limits.prefill_chunk or budget, budget, most)
        return chunk if self._boundary is None else self._cut(sequence, chunk, self._boundary)

    def _cut(self, sequence: Sequence, chunk: int, size: int) -> int:
        """Shorten a chunk so that it ends at a block boundary before the end of the prompt: other
        sequences can reuse the recurrent state of that position. A chunk that reaches no boundary
        stays whole.
        """
        start = sequence.num_scheduled
        last = min(start + chunk, sequence.num_known - 1)
        return max(last // size * size - start, 0) or chunk


def step_batch(
    batch: Batch, previous: Batch | None = None, previous_ticket: Ticket | None = None
) -> StepBatch:
    """The batch in the form that a device takes.

    `previous`, `previous_ticket`: the previous launch. The device feeds tokens that this launch has
    yet to sample to the batch.
    """
    sources = {sequence: row for row, sequence in enumerate(previous.sampling)} if previous else {}
    token_ids: list[int] = []
    fed: list[tuple[int, int]] = []
    steps = zip(batch.sequences, batch.starts, batch.query_lens, strict=True)
    for sequence, start, query_len in steps:
        known = sequence.tokens[start : start + query_len]
        if not known:  # `previous` samples the token
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
        after=previous_ticket if fed else None,
        is_plain=all(one.is_plain and one.matcher is None for one in batch.sampling),
    )


def rows_of(
    batch: Batch, sources: Mapping[Sequence, int] = MappingProxyType({})
) -> list[LogitsRow]:
    """The rows of logits that are sampled: one for each sampling sequence, and one after each
    draft.

    A row after drafts samples as if these drafts were tokens of the sequence, exactly as a later
    step would. `sources`: the row of each sequence in the previous step.
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


def _block_tables(batch: Batch) -> list[list[int]]:
    """The block tables of the batch: the first table of every sequence, then the second of every
    sequence, and so on.
    """
    tables = [sequence.lease.tables for sequence in batch.sequences if sequence.lease]
    if len(tables[0]) == 1:  # most models
        return [table for (table,) in tables]
    return [table for alike in zip(*tables, strict=True) for table in alike]


def _states(batch: Batch) -> list[tuple[list[int], list[int]]]:
    """For each sequence, the blocks from which its recurrent state is read, and the blocks to which
    it is written. Empty for a model without recurrent layers.
    """
    leases = [sequence.lease for sequence in batch.sequences if sequence.lease]
    if not leases[0].state_blocks:
        return []
    steps = zip(leases, batch.starts, strict=True)
    return [(lease.state_at(start), lease.state_blocks) for lease, start in steps]


def _logit_rows(batch: Batch) -> list[int]:
    """The positions in the batch's `token_ids` that need logits: first tokens after which a token
    is sampled, then tokens that score a prompt token.
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
            # The logits of a token score the next token.
            first = end - query_len - start - 1
            positions = scored[sequence].positions
            score_rows += range(first + positions.start, first + positions.stop)
    return sample_rows + score_rows


def _scored(scoring: Scoring) -> Scored:
    sequence, positions = scoring
    token_ids = sequence.tokens[positions.start : positions.stop]
    return Scored(token_ids, sequence.state.sampling.prompt_logprobs or 0)
