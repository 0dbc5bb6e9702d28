"""One step: the batch that a device computes, its input tensors, and the sampled tokens."""

from array import array
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple, Protocol, TypeAlias

import msgspec

if TYPE_CHECKING:  # graphs are checked, and the null engine runs, without loading torch
    import torch


class Logprob(NamedTuple):
    """The log probability of a token, and `top`: the most likely tokens, best first."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()
    rank: int | None = None  # 1: no token is more likely; set for prompt tokens only


@dataclass(frozen=True, slots=True)
class Sampled:
    """The tokens of one launch, in the order of its rows; `logprobs` where a row asked for them.

    `broken`: rows without a valid token. For the `exhausted` rows among them, the sampling options
    forbid every token; for the others, the logits are not finite. `prompt_logprobs`: in the order
    of `StepBatch.scored`.
    """

    token_ids: list[int]
    logprobs: list[Logprob | None] | None = None
    broken: frozenset[int] = frozenset()
    exhausted: frozenset[int] = frozenset()
    prompt_logprobs: list[list[Logprob]] = field(default_factory=list)

    def logprobs_of(self, rows: range) -> list[Logprob]:
        """The logprobs of some rows; rows that asked for none are left out."""
        found = [self.logprobs[row] for row in rows] if self.logprobs else []
        return [logprob for logprob in found if logprob is not None]


NO_SOURCE = -1  # of a LogitsRow whose tokens are all known


class SamplingParams(Protocol):
    """How the tokens of one answer are sampled; implemented by `Sampling` of the runtime."""

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
    """The sequence that a row belongs to.

    `tokens` are those of prompt and output. Another thread may append to them during a launch;
    entries never change.
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
        """The `allowed_token_ids` of its sampling, as int64 that a tensor can share."""
        ...


class LogitsRow(msgspec.Struct):
    """A row of logits to sample from: the token after `num_known` tokens and the `added` ones.

    `added` are drafts. Where a `source` is given, the added token is the one that row `source` of
    the launch before samples; it is unknown until the device calls `feed`.
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
        """Whether the added token comes from the launch before."""
        return self.source != NO_SOURCE

    @property
    def num_output(self) -> int:
        """The position of the token in the answer; with seed and choice the random number's key."""
        num_added = len(self.added) if self.source == NO_SOURCE else 1
        return self.num_known + num_added - self.answer.num_prompt

    @property
    def tokens(self) -> list[int]:
        return [*self.answer.tokens[: self.num_known], *self.added]

    @property
    def output(self) -> list[int]:
        return [*self.answer.tokens[self.answer.num_prompt : self.num_known], *self.added]

    def feed(self, token_ids: Sequence[int]) -> None:
        """Set the added token. `token_ids`: of the rows of the launch before, in their order."""
        if self.is_fed:
            self.added = (token_ids[self.source],)


# A running launch. `result()` waits for the sampled tokens; `add_done_callback` does not wait, and
# calls from a thread of the device; `cancel()` drops a launch that has not begun.
Ticket: TypeAlias = Future[Sampled]


class Scored(NamedTuple):
    """Prompt tokens to score: their logprobs, and at each position the `num_top` most likely."""

    token_ids: list[int]
    num_top: int


@dataclass(frozen=True, slots=True)
class StepBatch:
    """The input of one launch: the new tokens of several sequences, as numbers in host memory.

    Sequence i has `query_lens[i]` new tokens, and `contexts[i]` tokens after the step, in the
    blocks `block_tables[i]`. Lists are read before `launch` returns. A model whose layers use
    several block tables has the first tables of all sequences, then the second tables, and so on.
    Blocks that no kernel of a table reads any more are -1. `states`: for a model with recurrent
    state, the blocks that each sequence reads its state from (none before its first token) and the
    blocks that the step writes it to.

    `logit_rows`: indices of the new tokens that need logits; first those of `rows`, which are
    sampled, then those of `scored`.

    `fed`: pairs (index of a new token, row of `after`) for tokens that the launch `after` samples.
    The host may not know them yet; in `token_ids` they are 0. A launch fails if the launch `after`
    failed.
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
    """The inputs that the kernel dialect declares (STEP_INPUTS) as tensors, without the KV pool.

    A ragged batch: the new tokens of all sequences, one sequence after the other.

    Shapes: T new tokens in all, B sequences, M the largest number of blocks of one sequence, R rows
    of logits, N blocks of a recurrent state, G block tables. All tensors are on the backend's
    device; integers are int64, blocks int32.
    """

    token_ids: "torch.Tensor"  # [T]
    positions: "torch.Tensor"  # [T] position of each token in its sequence
    slots: "torch.Tensor"  # [G * T] where its key and value go: block * block_size + offset
    query_starts: "torch.Tensor"  # [B + 1] offsets into T
    context_lens: "torch.Tensor"  # [B] tokens of the sequence after this step, new ones included
    block_tables: "torch.Tensor"  # [G * B, M] blocks in order; padded with 0
    logit_rows: "torch.Tensor"  # [R] indices into T of the rows that need logits
    states: "torch.Tensor"  # [2, B, N] blocks that states are read from (-1: zeros), written to
    query_lens: tuple[int, ...]  # as in StepBatch, for code on the host
    contexts: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class KVLayout:
    """The shape of the blocks of a model's KV cache.

    `num_layers`: layers in one block; a model with several KV groups may have more layers. One
    tensor holds a pool: [num_layers, 2, num_blocks, num_kv_heads, block_size, head_dim] (2: keys,
    values), so that the keys, or the values, of one block in one layer are contiguous.
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
        """The shape of the pool's tensor."""
        head = (self.num_layers, 2, num_blocks)
        return (*head, self.num_kv_heads, self.block_size, self.head_dim)
