"""One step: what a device is asked to compute, and the tensors that a kernel graph reads of it."""

from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

from sagellm.backends.row import Row
from sagellm.backends.sampled import Sampled

if TYPE_CHECKING:  # graphs are checked, and the null engine runs, without loading torch
    import torch

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
    rows: Sequence[Row] = ()
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
