"""The cost of a step: how long a modelled engine takes, as a pure function of the batch."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

Row = tuple[
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


def step_shape(rows: Iterable[Row]) -> StepShape:
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
