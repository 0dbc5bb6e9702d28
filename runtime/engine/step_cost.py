"""The cost of a modelled step, and the sequences and runs of steps that it is the cost of."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

from sagellm.runtime.messages import FinishReason

StepRow = tuple[
    int, int, int
]  # of one sequence: first token to compute, how many, tokens of its prompt


class StepShape(NamedTuple):
    """What the cost of a step depends on.

    `num_prefill_tokens`: tokens of prompts, and of answers that are computed again. Cached tokens
    are not among them: they count as context. `num_prefill_pairs`: pairs of such a token and a
    token that it attends to, itself included. `num_decode_rows`: sequences that compute the token
    sampled last. `num_context_tokens`: the contexts of all rows, decodes and prefills, after the
    step.
    """

    num_prefill_tokens: int
    num_prefill_pairs: int
    num_decode_rows: int
    num_context_tokens: int


def step_shape(rows: Iterable[StepRow]) -> StepShape:
    """The shape of a step with these rows.

    One new token is a decode only after the whole prompt: the last token of a prompt that was
    computed in chunks is a prefill token, like those before it.
    """
    tokens = pairs = decodes = contexts = 0
    for start, count, num_prompt in rows:
        contexts += start + count
        if count == 1 and start >= num_prompt:
            decodes += 1
        else:
            tokens += count
            pairs += count * start + count * (count + 1) // 2
    return StepShape(tokens, pairs, decodes, contexts)


@dataclass(frozen=True, slots=True)
class StepCost:
    """Coefficients in seconds: a step, and each of what `StepShape` counts."""

    step_s: float
    prefill_token_s: float
    prefill_pair_s: float = 0.0
    decode_row_s: float = 0.0
    context_token_s: float = 0.0

    def seconds(self, shape: StepShape) -> float:
        """How long a step takes."""
        return (
            self.step_s
            + shape.num_prefill_tokens * self.prefill_token_s
            + shape.num_prefill_pairs * self.prefill_pair_s
            + shape.num_decode_rows * self.decode_row_s
            + shape.num_context_tokens * self.context_token_s
        )

    def run_seconds(self, first: StepShape, num_steps: int) -> float:
        """How long so many steps take of which `first` is the first, where all rows decode: each
        step, the context of each row is one token longer.
        """
        num_grown = first.num_decode_rows * (num_steps * (num_steps - 1) // 2)
        return num_steps * self.seconds(first) + num_grown * self.context_token_s


SequenceKey = tuple[str, int]  # request id, choice


class SequenceProgress(NamedTuple):
    """Tokens of a sequence, the last of them at `at_s`; with `end`, nothing comes after it.

    A sequence has one of these for its first token, and one for its end: `num_tokens` counts those
    since the one before.
    """

    key: SequenceKey
    num_tokens: int
    at_s: float
    end: FinishReason | None = None


@dataclass(slots=True, eq=False)
class ModelledSequence:
    """`num_cached` tokens have keys and values when it is admitted for the first time."""

    key: SequenceKey
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
class ModelledRun:
    """Steps one after the other that compute the same rows, more than one only if all decode."""

    begun_s: float
    rows: list[tuple[ModelledSequence, int]]
    shape: StepShape
    num_steps: int
    end_s: float = 0.0
