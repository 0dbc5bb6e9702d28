"""One step: the batch that a device computes, its input tensors, and the sampled tokens."""

from array import array
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple, Protocol, TypeAlias

import msgspec

if TYPE_CHECKING:
    import torch


class Logprob(NamedTuple):
    """The log probability of a token, and the most likely ones, best first."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()
    rank: int | None = None  # 1: none is more likely; known of prompt tokens only


@dataclass(frozen=True, slots=True)
class Sampled:
    """The tokens of one launch, in the order of its rows; `logprobs` where any were asked for.

    `broken`: rows whose tokens mean nothing. In those that are `exhausted`, the sampling options
    forbid every token; in the others, the logits are not finite. `prompt_logprobs`: in the order of
    `StepBatch.scored`.
    """

    token_ids: list[int]
    logprobs: list[Logprob | None] | None = None
    broken: frozenset[int] = frozenset()
    exhausted: frozenset[int] = frozenset()
    prompt_logprobs: list[list[Logprob]] = field(default_factory=list)

    def logprobs_of(self, rows: range) -> list[Logprob]:
        """Those of some rows; none where none were asked for."""
        found = [self.logprobs[row] for row in rows] if self.logprobs else []
        return [logprob for logprob in found if logprob is not None]


NO_SOURCE = -1


class SamplingParams(Protocol):
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


class SampledSequence(Protocol):
    """The sequence that a row belongs to. `tokens`, prompt and output, may grow meanwhile; what is
    there does not change.
    """

    @property
    def sampling(self) -> SamplingParams: ...
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


class LogitsRow(msgspec.Struct):
    """The token after the first `num_known` tokens of an answer, and after those `added` to them.

    `added` are drafts; or, where there is a `source`, the token that this row of the launch before
    samples: unknown until a device calls `feed`.
    """

    answer: SampledSequence
    num_known: int
    added: tuple[int, ...] = ()
    source: int = NO_SOURCE

    @property
    def sampling(self) -> SamplingParams:
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


# A launch under way. `result()` waits for what was sampled, `add_done_callback` calls without
# waiting, from a thread of the device; `cancel()` takes a launch back that has not begun.
Ticket: TypeAlias = Future[Sampled]


class Scored(NamedTuple):
    """Tokens of a prompt whose logprobs are wanted, with those of the `num_top` most likely."""

    token_ids: list[int]
    num_top: int


@dataclass(frozen=True, slots=True)
class StepBatch:
    """The new tokens of several sequences, as numbers of the host: what one launch computes.

    `query_lens[i]` new tokens of sequence i, which has `contexts[i]` tokens after the step, in
    `block_tables[i]`; lists are read before `launch` returns. A model whose layers lie in several
    block tables has those of all sequences for the first, then for the second, and so on. Blocks
    that no kernel of a table reads any more are -1. `states`: of a model with recurrent state, the
    blocks from which each sequence reads it (none before its first token), and to which it is
    written.

    `logit_rows` says which of the new tokens need logits: first those of `rows`, which are sampled,
    then those of `scored`.

    `fed`: (which new token, row of `after`): tokens that the launch `after` samples. The host need
    not know them yet; in `token_ids` they are 0. A launch fails where the one it comes `after` did.
    """

    token_ids: Sequence[int]
    query_lens: Sequence[int]
    contexts: Sequence[int]
    block_tables: Sequence[Sequence[int]]
    logit_rows: Sequence[int]
    rows: Sequence[LogitsRow] = ()
    scored: Sequence[Scored] = ()
    states: Sequence[tuple[Sequence[int], Sequence[int]]] = ()
    fed: Sequence[tuple[int, int]] = ()
    after: "Ticket | None" = field(default=None, repr=False)


@dataclass(frozen=True, slots=True)
class StepInputs:
    """The inputs that the kernel dialect declares (STEP_INPUTS), but for the KV pool, as tensors.

    A ragged batch: the new tokens of all sequences, one after the other.

    Shapes: T new tokens in all, B sequences, M the largest number of blocks of one sequence, R rows
    of logits wanted, N blocks of a recurrent state, G block tables. All on the backend's device;
    integers are int64, blocks int32.
    """

    token_ids: "torch.Tensor"  # [T]
    positions: "torch.Tensor"  # [T] position of each token in its sequence
    slots: "torch.Tensor"  # [G * T] where its key and value go: block * block_size + offset
    query_starts: "torch.Tensor"  # [B + 1] offsets into T
    context_lens: "torch.Tensor"  # [B] tokens of the sequence after this step, new ones included
    block_tables: "torch.Tensor"  # [G * B, M] blocks in order; padded with 0
    logit_rows: "torch.Tensor"  # [R] which of the T rows need logits
    states: "torch.Tensor"  # [2, B, N] where states are read (-1: they are 0) and written
    query_lens: tuple[int, ...]  # the same as query_starts and context_lens, for the host
    contexts: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class KVLayout:
    """The shape of the blocks in which a model's key / value cache lies.

    `num_layers`: of one block; a model with several KV groups may have more. One tensor holds a
    pool: [num_layers, 2, num_blocks, num_kv_heads, block_size, head_dim] (2: keys, values), so that
    one block of one layer is contiguous per key or value.
    """

    num_layers: int
    num_kv_heads: int
    head_dim: int
    block_size: int
    dtype: str  # "float32" | "bfloat16"

    @property
    def block_bytes(self) -> int:
        """Bytes of one block over its layers."""
        itemsize = 4 if self.dtype == "float32" else 2
        per_layer = 2 * self.num_kv_heads * self.block_size * self.head_dim
        return self.num_layers * per_layer * itemsize

    def pool_shape(self, num_blocks: int) -> tuple[int, ...]:
        head = (self.num_layers, 2, num_blocks)
        return (*head, self.num_kv_heads, self.block_size, self.head_dim)
