"""One step of an engine: what is computed, sampled and scored in it, and who waits for blocks."""

from dataclasses import dataclass, field
from typing import NamedTuple

import trio

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
class Landing:
    """Somebody who waits for blocks that another pool will fill."""

    fence: Fence
    num_tokens: int
    arrival: int
    granted: trio.Event = field(default_factory=trio.Event)
    lease: Lease | None = None
