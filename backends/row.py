"""A row of logits that a token is sampled from, and what the sampling of it depends on."""

from array import array
from collections.abc import Mapping, Sequence
from typing import Protocol

import msgspec

NO_SOURCE = -1


class SamplingOptions(Protocol):
    """How tokens of one answer are sampled; see `Sampling` of the runtime."""

    @property
    def temperature(self) -> float: ...
    @property
    def top_k(self) -> int: ...
    @property
    def top_p(self) -> float: ...
    @property
    def min_p(self) -> float: ...
    @property
    def repetition_penalty(self) -> float: ...
    @property
    def presence_penalty(self) -> float: ...
    @property
    def frequency_penalty(self) -> float: ...
    @property
    def logit_bias(self) -> Mapping[int, float]: ...
    @property
    def allowed_token_ids(self) -> tuple[int, ...]: ...
    @property
    def bad_words_token_ids(self) -> tuple[tuple[int, ...], ...]: ...
    @property
    def min_tokens(self) -> int: ...
    @property
    def seed(self) -> int | None: ...
    @property
    def logprobs(self) -> int | None: ...


class Answer(Protocol):
    """The sequence that a row belongs to. `tokens`, prompt and output, may grow meanwhile; what is
    there does not change.
    """

    @property
    def sampling(self) -> SamplingOptions: ...
    @property
    def choice(self) -> int: ...
    @property
    def num_prompt(self) -> int: ...
    @property
    def tokens(self) -> list[int]: ...
    @property
    def stop_ids(self) -> frozenset[int]: ...
    @property
    def allowed_ids(self) -> "array[int]":
        """`allowed_token_ids` of its sampling."""
        ...


class Row(msgspec.Struct):
    """The token after the first `num_known` tokens of an answer, and after those `added` to them.

    `added` are drafts; or, where there is a `source`, the token that this row of the launch before
    samples: unknown until a device calls `feed`.
    """

    answer: Answer
    num_known: int
    added: tuple[int, ...] = ()
    source: int = NO_SOURCE

    @property
    def sampling(self) -> SamplingOptions:
        return self.answer.sampling

    @property
    def is_fed(self) -> bool:
        return self.source != NO_SOURCE

    @property
    def num_output(self) -> int:
        """The position of its token in the answer: with seed and choice, the key of its random
        number.
        """
        num_added = len(self.added) if self.source == NO_SOURCE else 1
        return self.num_known + num_added - self.answer.num_prompt

    @property
    def tokens(self) -> list[int]:
        return [*self.answer.tokens[: self.num_known], *self.added]

    @property
    def output(self) -> list[int]:
        return [*self.answer.tokens[self.answer.num_prompt : self.num_known], *self.added]

    def feed(self, token_ids: Sequence[int]) -> None:
        """Take what the launch before sampled, in the order of its rows."""
        if self.is_fed:
            self.added = (token_ids[self.source],)
