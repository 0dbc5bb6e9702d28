"""One step: the batch that a device computes, its input tensors, and the sampled tokens."""

from array import array
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple, Protocol, TypeAlias

import msgspec

from sagellm.graphs.kernels.memory_layout import ITEM_BYTES, SCALE_BYTES

if TYPE_CHECKING:  # graphs are checked, and the null engine runs, without loading numpy
    from sagellm.backends.arrays import Array, BlockIds, Integers


class Logprob(NamedTuple):
    """The logprob of a token. `top`: (id, logprob) of the most likely tokens, best first."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()
    rank: int | None = None  # 1: no token is more likely; set for prompt tokens only


@dataclass(frozen=True, slots=True)
class Sampled:
    """The sampled tokens of one launch, in the order of its rows.

    `logprobs`: an entry for each row, None for a row that did not ask; None if no row asked.
    `broken`: rows without a valid token. In `exhausted` rows, a subset of `broken`, the sampling
    options forbid every token. The grammar of `refused` rows, also a subset, exceeded its limits,
    or has no token left before it may end; each has the reason. In the other broken rows, the
    logits are not finite.
    `prompt_logprobs`: a list for each entry of `StepBatch.scored`, in the same order.
    """

    token_ids: list[int]
    logprobs: list[Logprob | None] | None = None
    broken: frozenset[int] = frozenset()
    exhausted: frozenset[int] = frozenset()
    refused: Mapping[int, str] = field(default_factory=dict)
    prompt_logprobs: list[list[Logprob]] = field(default_factory=list)

    def logprobs_of(self, rows: range) -> list[Logprob]:
        """The logprobs of `rows`, without the rows that did not ask for them."""
        found = [self.logprobs[row] for row in rows] if self.logprobs else []
        return [logprob for logprob in found if logprob is not None]


NO_SOURCE = -1  # the `source` of a LogitsRow whose tokens are all known


class SamplingParams(Protocol):
    """The sampling options of one answer; the runtime's `Sampling` implements them."""

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


GREEDY_BELOW = 1e-5  # dividing by a smaller temperature overflows; as vLLM


def has_penalty(sampling: SamplingParams) -> bool:
    return (
        sampling.repetition_penalty != 1
        or sampling.presence_penalty != 0
        or sampling.frequency_penalty != 0
    )


def takes_largest(sampling: SamplingParams) -> bool:
    """Whether each token of an answer without a grammar is the largest logit, and no logprob is
    wanted.
    """
    return sampling.temperature < GREEDY_BELOW and not (
        sampling.logit_bias
        or sampling.min_tokens
        or sampling.allowed_token_ids
        or sampling.bad_words_token_ids
        or sampling.logprobs is not None
        or has_penalty(sampling)
    )


class MatcherError(RuntimeError):
    """A grammar cannot go on within its limits. The message gives the reason, and is safe to
    show.
    """


class Matcher(Protocol):
    """Follows the grammar of one sequence. All calls come from one thread at a time."""

    @property
    def vocab_size(self) -> int:
        """The number of logits of a row."""
        ...

    def fill(self, output: Sequence[int], mask: "BlockIds") -> None:
        """Write the tokens that may follow `output` to `mask` [ceil(vocab_size / 32)], a bit each,
        the lowest bit first.

        A function of `output` alone: the matcher advances or rolls back from where it was. If
        `output` has left the grammar, as wrong drafts do, the mask allows every token. If no token
        may follow, not even the end of the text, the mask is zero. Raises MatcherError.
        """
        ...

    def may_end(self, output: Sequence[int]) -> bool:
        """Whether `output` is a complete text of the grammar. Raises MatcherError."""
        ...


class SampledSequence(Protocol):
    """The sequence that a row belongs to.

    `tokens`: the prompt and the output. Another thread may append tokens during a launch, but
    existing entries never change.
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
        """`sampling.allowed_token_ids` as int64, whose memory a numpy array can share."""
        ...

    @property
    def matcher(self) -> Matcher | None:
        """The matcher of the sequence's grammar; None if the sequence has no grammar."""
        ...


class LogitsRow(msgspec.Struct):
    """A row of logits to sample from. It predicts the token that follows `num_known` tokens of the
    sequence and the tokens `added`.

    Without a `source`, `added` are draft tokens. With a `source`, `added` is the single token that
    row `source` of the previous launch samples; it is empty until the device calls `feed`.
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
        """Whether the added token comes from the previous launch."""
        return self.source != NO_SOURCE

    @property
    def num_output(self) -> int:
        """The index of the sampled token in the output. (seed, choice, index) determine the random
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
        """Set the added token. `token_ids`: the tokens of the previous launch, one per row."""
        if self.is_fed:
            self.added = (token_ids[self.source],)


# A running launch. `result()` waits for the sampled tokens; `add_done_callback` does not wait, and
# its callback runs on a thread of the device; `cancel()` drops a launch that has not begun.
Ticket: TypeAlias = Future[Sampled]


class Scored(NamedTuple):
    """Prompt tokens to score: each token's logprob, and the `num_top` most likely tokens there."""

    token_ids: list[int]
    num_top: int


@dataclass(frozen=True, slots=True)
class StepBatch:
    """The input of one launch: the new tokens of several sequences, as numbers in host memory.

    Sequence i has `query_lens[i]` new tokens, and `contexts[i]` tokens after the step, in the
    blocks `block_tables[i]`. Lists are read before `launch` returns. For a model whose layers use
    several block tables, `block_tables` holds the first table of every sequence, then the second
    table of every sequence, and so on. A block that no kernel reads any more is -1.

    `states`: for each sequence of a model with recurrent state, the blocks to read the state from
    (none before the first token) and the blocks to write the new state to.

    `logit_rows`: indices of the new tokens that need logits: first those of `rows`, which are
    sampled, then those of `scored`.

    `after`: the previous launch, if it samples some of the new tokens. `fed`: for each such token,
    the pair (index into `token_ids`, row of `after`); `token_ids` holds 0 for it, because the host
    may not know the token yet. A launch fails if the launch `after` failed.

    `is_plain`: `takes_largest` holds for all `rows`, and none has a grammar.
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
    is_plain: bool = False


@dataclass(frozen=True, slots=True)
class StepInputs:
    """The inputs that the kernel dialect declares (STEP_INPUTS) as arrays, without the KV pool.

    The batch is ragged: the new tokens of all sequences, one sequence after the other.

    Shapes: T new tokens in all, B sequences, M the largest number of blocks of one sequence, R rows
    of logits, N blocks of a recurrent state, G block tables per sequence. All arrays are in host
    memory; block ids are int32, all other integers int64.
    """

    token_ids: "Integers"  # [T]
    positions: "Integers"  # [T] position of each token in its sequence
    slots: "Integers"  # [G * T] slot of each token's key and value: block * block_size + offset
    query_starts: "Integers"  # [B + 1] offsets into T
    context_lens: "Integers"  # [B] tokens of the sequence, including the new ones
    block_tables: "BlockIds"  # [G * B, M] blocks in order; padded with 0
    logit_rows: "Integers"  # [R] indices into T of the rows that need logits
    states: "BlockIds"  # [2, B, N] blocks to read states from (-1: zeros), and to write them to
    query_lens: tuple[int, ...]  # as in StepBatch, for code on the host
    contexts: tuple[int, ...]
    token_types: "Integers | None" = None  # [T]; only of a batch to embed


@dataclass(frozen=True, slots=True)
class KVLayout:
    """The shape of the blocks of a model's KV cache.

    `num_layers`: the layers that one block holds; fewer than the model's if it has several KV
    groups. A pool has the shape [num_layers, 2, num_blocks, num_kv_heads, block_size, head_dim],
    where 2 stands for keys and values. So the keys of one block in one layer are contiguous, and so
    are its values. With dtype "int8" a key or a value is head_dim codes and the bytes of its scale,
    a bfloat16, so that the last size is head_dim + SCALE_BYTES.
    """

    num_layers: int
    num_kv_heads: int
    head_dim: int
    block_size: int
    dtype: str  # "float32" | "bfloat16" | "int8"

    @property
    def block_bytes(self) -> int:
        """Bytes of one block: keys and values of `num_layers` layers."""
        per_layer = 2 * self.num_kv_heads * self.block_size * self._row_len
        return self.num_layers * per_layer * ITEM_BYTES[self.dtype]

    def pool_shape(self, num_blocks: int) -> tuple[int, ...]:
        """The shape of the pool's array."""
        head = (self.num_layers, 2, num_blocks)
        return (*head, self.num_kv_heads, self.block_size, self._row_len)

    @property
    def _row_len(self) -> int:
        """The items of a key or a value."""
        return self.head_dim + (SCALE_BYTES if self.dtype == "int8" else 0)


def head_dim_of(pool: "Array") -> int:
    """The head dimension of a pool of the shape `KVLayout.pool_shape`."""
    return int(pool.shape[5]) - (SCALE_BYTES if pool.dtype.name == "int8" else 0)
