"""The part of a device that embeds: batches in, vectors out."""

from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Protocol, TypeAlias, runtime_checkable

import numpy as np

from sagellm.backends.arrays import Floats
from sagellm.backends.interface import Program
from sagellm.backends.step import KVLayout, StepInputs

# The layout of a model without KV cache: nothing is read from it.
NO_KV = KVLayout(num_layers=1, num_kv_heads=1, head_dim=2, block_size=1, dtype="float32")

# [B, size] float32: one row for each sequence, in their order. Raises the errors of the launch.
VectorsTicket: TypeAlias = "Future[Floats]"


@dataclass(frozen=True, slots=True)
class TextBatch:
    """Whole sequences of token ids, none empty, that a device embeds in one launch.

    `first_lens`: for each sequence, the number of its tokens that have type 0; those after them, of
    a second text, have type 1. None: all tokens have type 0.
    """

    sequences: Sequence[Sequence[int]]
    first_lens: Sequence[int] | None = None


class EmbeddingQueue(Protocol):
    """The launches of one engine that embeds, computed in order. All calls come from one thread."""

    def embed(self, program: Program, batch: TextBatch) -> VectorsTicket:
        """Queue a batch, and return at once."""
        ...

    def close(self) -> None:
        """Free the queue's resources, after the launch that runs."""
        ...


@runtime_checkable
class EmbeddingDevice(Protocol):
    """A device that computes programs whose result is a vector for each sequence."""

    def open_embedding_queue(self, threads: int | None = None) -> EmbeddingQueue:
        """Open a queue whose kernels use `threads` host threads; None: the backend chooses."""
        ...


def batch_inputs(batch: TextBatch) -> StepInputs:
    """The inputs of a step that embeds, as arrays in host memory."""
    lengths = tuple(map(len, batch.sequences))
    starts = np.zeros(len(lengths) + 1, dtype=np.int64)
    np.cumsum(lengths, out=starts[1:])
    token_ids = np.empty(starts[-1], dtype=np.int64)
    for first, sequence in zip(starts, batch.sequences, strict=False):
        token_ids[first : first + len(sequence)] = sequence
    positions = np.arange(len(token_ids)) - np.repeat(starts[:-1], lengths)
    token_types = np.zeros_like(token_ids)
    if batch.first_lens is not None:
        token_types = (positions >= np.repeat(batch.first_lens, lengths)).astype(np.int64)
    nothing = np.empty(0, dtype=np.int64)
    return StepInputs(
        token_ids=token_ids,
        positions=positions,
        slots=nothing,
        query_starts=starts,
        context_lens=np.array(lengths, dtype=np.int64),
        block_tables=np.empty((len(lengths), 0), dtype=np.int32),
        logit_rows=nothing,
        states=np.empty((2, len(lengths), 0), dtype=np.int32),
        query_lens=lengths,
        contexts=lengths,
        token_types=token_types,
    )
