"""A sequence as it will be when the step under way has drawn its token."""

from array import array
from dataclasses import dataclass

from sagellm.runtime.engine.sequence import Sequence
from sagellm.runtime.kv.lease import Fence
from sagellm.runtime.messages import SequenceState


@dataclass(slots=True)
class Behind:
    """What a draw looks at, one token behind the `num_known` that are known when it is made.

    The runner's thread reads it while the engine's loop may already take that token into the
    sequence: so nothing here depends on how long `Sequence.tokens` is by now; it only grows.
    `source` is the row of the step under way that draws `token_id`.
    """

    sequence: Sequence
    source: int
    num_known: int
    token_id: int = -1

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
        return self.num_known + 1 - self.sequence.num_prompt

    @property
    def allowed_ids(self) -> "array[int]":
        return self.sequence.allowed_ids

    @property
    def tokens(self) -> list[int]:
        return [*self.sequence.tokens[: self.num_known], self.token_id]

    @property
    def output(self) -> list[int]:
        return [*self.sequence.tokens[self.sequence.num_prompt : self.num_known], self.token_id]
