"""The cost of a step as a pure function of its batch, and the sequences of a modelled engine."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

from sagellm.runtime.messages import FinishReason

# One sequence of a step: its first token to compute, how many tokens, tokens of its prompt.
StepRow = tuple[int, int, int]


class StepShape(NamedTuple):
    """The counts that the cost of a step depends on.

    `num_prefill_tokens`: computed tokens of prompts, and of answers that are computed again. Cached
    tokens count as context instead. `num_prefill_pairs`: pairs of such a token and a token that it
    attends to, itself included. `num_decode_rows`: sequences that compute the token sampled last.
    `num_context_tokens`: the contexts of all rows, decodes and prefills, after the step.
    """

    num_prefill_tokens: int
    num_prefill_pairs: int
    num_decode_rows: int
    num_context_tokens: int


def step_shape(rows: Iterable[StepRow]) -> StepShape:
    """The shape of a step with these rows.

    A row of one token is a decode only after the whole prompt. The last token of a prompt that is
    computed in chunks is a prefill token.
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
    """Seconds of a step, and seconds of one of each that `StepShape` counts."""

    step_s: float
    prefill_token_s: float
    prefill_pair_s: float = 0.0
    decode_row_s: float = 0.0
    context_token_s: float = 0.0

    def seconds(self, shape: StepShape) -> float:
        """The duration of a step."""
        return (
            self.step_s
            + shape.num_prefill_tokens * self.prefill_token_s
            + shape.num_prefill_pairs * self.prefill_pair_s
            + shape.num_decode_rows * self.decode_row_s
            + shape.num_context_tokens * self.context_token_s
        )

    def run_seconds(self, first: StepShape, num_steps: int) -> float:
        """The duration of consecutive steps in which all rows decode. `first` is the first step;
        in each step after it, the context of each row is one token longer.
        """
        num_grown = first.num_decode_rows * (num_steps * (num_steps - 1) // 2)
        return num_steps * self.seconds(first) + num_grown * self.context_token_s


SequenceKey = tuple[str, int]  # request id, choice


class SequenceProgress(NamedTuple):
    """Progress of a sequence: reported with its first token, and at its end.

    `num_tokens`: tokens since the report before, the last of them at `at_s`. `end`: why the
    sequence has ended; None with the first token.
    """

    key: SequenceKey
    num_tokens: int
    at_s: float
    end: FinishReason | None = None


@dataclass(slots=True, eq=False)
class ModelledSequence:
    """A sequence as numbers of tokens. `num_cached` tokens have keys and values when the sequence
    is first admitted.
    """

    key: SequenceKey
    rank: tuple[int, int]
    num_prompt: int
    num_output: int
    num_emitted: int
    num_cached: int
    num_computed: int = 0
    num_blocks: int = 0
    num_reported: int = 0  # of the emitted tokens
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
        """Whether the token sampled last is the only pending token."""
        return self.num_pending == 1 and self.num_computed >= self.num_prompt


@dataclass(slots=True)
class ModelledRun:
    """Consecutive steps that compute the same rows. Only rows that all decode make a run of more
    than one step.
    """

    begun_s: float
    rows: list[tuple[ModelledSequence, int]]
    shape: StepShape
    num_steps: int
    end_s: float = 0.0
