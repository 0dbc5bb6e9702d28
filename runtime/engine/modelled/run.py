"""What a modelled engine works on, and what comes of it: numbers of tokens, and no token."""

from dataclasses import dataclass
from typing import NamedTuple

from sagellm.runtime.engine.modelled.cost import StepShape
from sagellm.runtime.messages import FinishReason

Key = tuple[str, int]  # request id, choice


class Progress(NamedTuple):
    """Tokens of a sequence, the last of them at `at_s`; with `end`, nothing comes after it.

    A sequence has one of these for its first token, and one for its end: `num_tokens` counts those
    since the one before.
    """

    key: Key
    num_tokens: int
    at_s: float
    end: FinishReason | None = None


@dataclass(slots=True, eq=False)
class ModelledSequence:
    """`num_cached` tokens have keys and values when it is admitted for the first time."""

    key: Key
    rank: tuple[int, int]
    num_prompt: int
    num_output: int
    num_emitted: int
    num_cached: int
    num_computed: int = 0
    num_blocks: int = 0
    num_reported: int = 0  # of those emitted
    has_reported: bool = False  # its first token
    is_cancelled: bool = False

    @property
    def num_known(self) -> int:
        return self.num_prompt + self.num_emitted

    @property
    def num_pending(self) -> int:
        return self.num_known - self.num_computed

    @property
    def is_decoding(self) -> bool:
        """Whether its next token is all that it computes."""
        return self.num_pending == 1 and self.num_computed >= self.num_prompt


@dataclass(slots=True)
class Run:
    """Steps one after the other that compute the same rows, more than one only if all decode."""

    begun_s: float
    rows: list[tuple[ModelledSequence, int]]
    shape: StepShape
    num_steps: int
    end_s: float = 0.0
