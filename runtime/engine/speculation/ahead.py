"""A sequence as it would be behind its drafts."""

from array import array
from typing import NamedTuple

from sagellm.runtime.engine.sequence import Sequence
from sagellm.runtime.kv.lease import Fence
from sagellm.runtime.messages import SequenceState


class Ahead(NamedTuple):
    """A sequence as it will be where `drafts` are right: what the draw behind them looks at.

    The draw depends on the tokens before it (penalties) and on its position (randomness,
    min_tokens), so it is the very draw that a step of its own would make.
    """

    sequence: Sequence
    drafts: tuple[int, ...]

    @property
    def fence(self) -> Fence:
        return self.sequence.fence

    @property
    def state(self) -> SequenceState:
        return self.sequence.state

    @property
    def stop_ids(self) -> frozenset[int]:
        return self.sequence.stop_ids

    @property
    def num_output(self) -> int:
        return self.sequence.num_output + len(self.drafts)

    @property
    def allowed_ids(self) -> "array[int]":
        return self.sequence.allowed_ids

    @property
    def tokens(self) -> list[int]:
        return [*self.sequence.tokens, *self.drafts]

    @property
    def output(self) -> list[int]:
        return [*self.sequence.output, *self.drafts]
