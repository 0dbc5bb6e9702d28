"""One step of an engine: what is computed, drawn and scored in it, and who waits for blocks."""

from collections.abc import Sequence as Items
from dataclasses import dataclass, field
from typing import NamedTuple

import trio

from sagellm.backends.layers_done import LayersDone
from sagellm.runtime.engine.behind import Behind
from sagellm.runtime.engine.sequence import Sequence
from sagellm.runtime.engine.speculation.ahead import Ahead
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
    says of which prompt tokens logprobs are wanted. The first `num_decodes` sequences have nothing
    pending but the token they drew last; `drafts` are guesses of what some of those draw next,
    computed behind it and counted in its query length. Where there are `behind`, one for each
    sequence, the pending tokens are those that the step before this one draws: it was made before
    they were known. `layers_done` is told of each layer, where somebody wants to know.
    """

    sequences: list[Sequence] = field(default_factory=list)
    query_lens: list[int] = field(default_factory=list)
    drawing: list[Sequence] = field(default_factory=list)
    scoring: list[Scoring] = field(default_factory=list)
    num_decodes: int = 0
    drafts: dict[Sequence, list[int]] = field(default_factory=dict)
    behind: list[Behind] = field(default_factory=list)
    layers_done: LayersDone | None = None

    @property
    def is_behind(self) -> bool:
        """Whether it computes what the step before it draws."""
        return bool(self.behind)

    @property
    def starts(self) -> list[int]:
        """How many tokens of each sequence are computed before this step."""
        if self.behind:
            return [row.num_known for row in self.behind]
        return [sequence.num_computed for sequence in self.sequences]

    def feed(self, token_ids: Items[int]) -> list[int]:
        """Take what the step before this one drew, in the order of its rows; the pending tokens."""
        for row in self.behind:
            row.token_id = token_ids[row.source]
        return [row.token_id for row in self.behind]

    def add(self, sequence: Sequence, query_len: int) -> None:
        self.sequences.append(sequence)
        self.query_lens.append(query_len)
        if query_len == sequence.num_pending:
            self.drawing.append(sequence)
        positions = sequence.unscored(query_len)
        if positions:
            self.scoring.append(Scoring(sequence, positions))

    def guess(self, index: int, drafts: list[int]) -> None:
        """Compute drafts behind the pending token of a decode; its lease reaches that far."""
        if drafts:
            self.drafts[self.sequences[index]] = drafts
            self.query_lens[index] += len(drafts)

    @property
    def decodes(self) -> list[Sequence]:
        return self.sequences[: self.num_decodes]

    @property
    def is_decoding(self) -> bool:
        """Whether no prompt is computed."""
        return self.num_decodes == len(self.sequences)

    @property
    def rows(self) -> Items[Sequence | Ahead | Behind]:
        """What is drawn: each drawing sequence, and behind it where its drafts would lead."""
        if self.behind:
            return self.behind
        if not self.drafts:
            return list(self.drawing)
        return [row for sequence in self.drawing for row in self._rows(sequence)]

    def _rows(self, sequence: Sequence) -> list[Sequence | Ahead]:
        drafts = tuple(self.drafts.get(sequence, ()))
        ahead = range(1, len(drafts) + 1)
        return [sequence, *(Ahead(sequence, drafts[:size]) for size in ahead)]

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
