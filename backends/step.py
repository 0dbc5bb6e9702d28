"""The inputs and outputs of one forward step: what a lowered kernel graph is called with."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # graphs are checked, and the null engine runs, without loading torch
    import torch


@dataclass(frozen=True, slots=True)
class StepInputs:
    """A ragged batch: the new tokens of all sequences, one behind the other.

    Shapes: T new tokens in all, B sequences, M the largest number of blocks of one sequence, R rows
    of logits wanted. All on the backend's device; integers are int64, `block_tables` int32.
    """

    token_ids: "torch.Tensor"  # [T]
    positions: "torch.Tensor"  # [T] position of each token in its sequence
    slots: "torch.Tensor"  # [T] where its key and value go: block * block_size + offset
    query_starts: "torch.Tensor"  # [B + 1] offsets into T
    context_lens: "torch.Tensor"  # [B] tokens of the sequence after this step, new ones included
    block_tables: "torch.Tensor"  # [B, M] blocks in order; padded with 0
    logit_rows: "torch.Tensor"  # [R] which of the T rows need logits
    query_lens: tuple[int, ...]  # the same as query_starts and context_lens, for the host
    contexts: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class KVLayout:
    """The shape of a model's key / value cache.

    One tensor holds a pool: [num_layers, 2, num_blocks, num_kv_heads, block_size, head_dim]
    (2: keys, values), so that one block of one layer is contiguous per key or value.
    """

    num_layers: int
    num_kv_heads: int
    head_dim: int
    block_size: int
    dtype: str  # "float32" | "bfloat16"

    @property
    def block_bytes(self) -> int:
        """Bytes of one block over all layers."""
        itemsize = 4 if self.dtype == "float32" else 2
        per_layer = 2 * self.num_kv_heads * self.block_size * self.head_dim
        return self.num_layers * per_layer * itemsize

    def pool_shape(self, num_blocks: int) -> tuple[int, ...]:
        head = (self.num_layers, 2, num_blocks)
        return (*head, self.num_kv_heads, self.block_size, self.head_dim)
