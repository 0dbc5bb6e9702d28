"""One step of an engine: what is computed, drawn and scored in it, and who waits for blocks."""

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
    """One step: `query_lens[i]` new tokens of `sequences[i]`, the next pending ones of each.

    `drawing` are those that have nothing pending after this step, and so draw a token; `scoring`
    says of which prompt tokens logprobs are wanted.
    """

    sequences: list[Sequence] = field(default_factory=list)
    query_lens: list[int] = field(default_factory=list)
    drawing: list[Sequence] = field(default_factory=list)
    scoring: list[Scoring] = field(default_factory=list)

    def add(self, sequence: Sequence, query_len: int) -> None:
        self.sequences.append(sequence)
        self.query_lens.append(query_len)
        if query_len == sequence.num_pending:
            self.drawing.append(sequence)
        positions = sequence.unscored(query_len)
        if positions:
            self.scoring.append(Scoring(sequence, positions))

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
