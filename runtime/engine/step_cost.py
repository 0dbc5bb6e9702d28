"""The cost of a step as a pure function of its batch, and the records of `EngineModel`."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from math import sqrt
from typing import NamedTuple, Protocol

from sagellm.runtime.engine.block_model import CachedSpan
from sagellm.runtime.messages import FinishReason

# One sequence of a step: position of the first token to compute, number of tokens, prompt length.
StepRow = tuple[int, int, int]


class StepShape(NamedTuple):
    """The counts that the cost of a step depends on.

    `num_prefill_tokens`: computed tokens of prompts, and of answers that are computed again. Cached
    tokens count as context instead. `num_prefill_pairs`: pairs of a prefill token and a token that
    it attends to, itself included. `num_decode_rows`: sequences that compute only their last
    sampled token. `num_context_tokens`: the sum of the context lengths of all rows after the step.
    `num_prefill_rows`: sequences that compute prefill tokens. `num_prefill_context_tokens`: their
    part of `num_context_tokens`.
    """

    num_prefill_tokens: int
    num_prefill_pairs: int
    num_decode_rows: int
    num_context_tokens: int
    num_prefill_rows: int = 0
    num_prefill_context_tokens: int = 0

    @property
    def num_tokens(self) -> int:
        """All computed tokens of the step."""
        return self.num_prefill_tokens + self.num_decode_rows

    @property
    def num_rows(self) -> int:
        """The sequences of the step."""
        return self.num_prefill_rows + self.num_decode_rows

    @property
    def is_mixed(self) -> bool:
        """Whether some sequences decode, and others compute prefill tokens."""
        return self.num_decode_rows > 0 and self.num_prefill_tokens > 0

    @property
    def num_decode_context_tokens(self) -> int:
        """The sum of the context lengths of decodes."""
        return self.num_context_tokens - self.num_prefill_context_tokens


class CostModel(Protocol):
    """The time of a step as a pure function of its shape."""

    def seconds(self, shape: StepShape) -> float:
        """The duration of a step, in seconds."""
        ...

    def run_seconds(self, first: StepShape, num_steps: int) -> float:
        """The duration, in seconds, of `num_steps` consecutive steps in which all rows decode.
        `first` is the shape of the first step; each later step has one more context token in each
        row. Its own running time does not grow with `num_steps`.
        """
        ...


def step_shape(rows: Iterable[StepRow]) -> StepShape:
    """The shape of a step with these rows.

    A row of one token is a decode only after the whole prompt. The last token of a prompt that is
    computed in chunks is a prefill token.
    """
    tokens = pairs = decodes = contexts = prefills = prefill_contexts = 0
    for start, count, num_prompt in rows:
        contexts += start + count
        if count == 1 and start >= num_prompt:
            decodes += 1
        else:
            tokens += count
            pairs += count * start + count * (count + 1) // 2
            prefills += 1
            prefill_contexts += start + count
    return StepShape(tokens, pairs, decodes, contexts, prefills, prefill_contexts)


@dataclass(frozen=True, slots=True)
class StepCost:
    """The coefficients of the time of a step, in seconds. `step_s`: the fixed cost of a step. The
    other fields: the cost of one unit of each count in `StepShape`.
    """

    step_s: float
    prefill_token_s: float
    prefill_pair_s: float = 0.0
    decode_row_s: float = 0.0
    context_token_s: float = 0.0

    def seconds(self, shape: StepShape) -> float:
        """The duration of a step, in seconds."""
        return (
            self.step_s
            + shape.num_prefill_tokens * self.prefill_token_s
            + shape.num_prefill_pairs * self.prefill_pair_s
            + shape.num_decode_rows * self.decode_row_s
            + shape.num_context_tokens * self.context_token_s
        )

    def run_seconds(self, first: StepShape, num_steps: int) -> float:
        """The duration, in seconds, of `num_steps` consecutive steps in which all rows decode.
        `first` is the shape of the first step; each later step has one more context token in each
        row.
        """
        num_grown = first.num_decode_rows * (num_steps * (num_steps - 1) // 2)
        return num_steps * self.seconds(first) + num_grown * self.context_token_s


SequenceKey = tuple[str, int]  # request id, choice


class SequenceProgress(NamedTuple):
    """A report of the progress of a sequence, made with its first token and at its end.

    `num_tokens`: the number of tokens since the previous report. `at_s`: the time of the last of
    these tokens, in seconds. `end`: why the sequence has ended; None with the first token.
    `begun_s`: when its first step began; None: it never began. `num_cached`: cached prompt tokens
    when it was first admitted.
    """

    key: SequenceKey
    num_tokens: int
    at_s: float
    end: FinishReason | None = None
    begun_s: float | None = None
    num_cached: int = 0


@dataclass(slots=True, eq=False)
class ModelledSequence:
    """A sequence as numbers of tokens. `num_cached` tokens have keys and values when the sequence
    is first admitted. `keys`: see `BlockHolder`. `holds`: its blocks stay leased after its end.
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
    has_reported: bool = False  # whether its first token was reported
    is_cancelled: bool = False
    keys: Sequence[bytes] = ()
    spans: list[CachedSpan] = field(default_factory=list)
    holds: bool = False
    was_admitted: bool = False
    begun_s: float | None = None  # the beginning of its first step
    last_s: float = -1.0  # the time of its latest token; negative: none yet

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


class Variation(NamedTuple):
    """How the steps of one run vary: the mean of measured over expected seconds, the distance of a
    single step from the mean, and the correlation of two steps.
    """

    mean: float = 1.0
    distance: float = 0.0
    correlation: float = 0.0

    def factor(self, num_steps: int) -> float:
        """Measured over expected seconds of a run. The seconds of a run grow with its steps."""
        apart = (1 - self.correlation) / num_steps
        return self.mean + self.distance * sqrt(self.correlation + apart)


NO_VARIATION = Variation()


@dataclass(slots=True)
class ModelledRun:
    """Consecutive steps that compute the same rows. A run has more than one step only if all rows
    decode.
    """

    begun_s: float
    rows: list[tuple[ModelledSequence, int]]
    shape: StepShape
    num_steps: int
    end_s: float = 0.0
    variation: Variation = NO_VARIATION
