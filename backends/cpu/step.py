"""One forward step as the kernels see it: its inputs, its pool, and what layers share."""

from collections.abc import Callable
from typing import TypeVar, cast

import torch

from sagellm.backends.step import StepInputs

T = TypeVar("T")


class Step:
    """Lives for one `run`. `once` keeps what is the same in every layer."""

    def __init__(self, inputs: StepInputs, pool: torch.Tensor) -> None:
        self.inputs = inputs
        self.pool = pool
        self._kept: dict[object, object] = {}

    def once(self, key: object, make: Callable[[], T]) -> T:
        """`make()` the first time `key` is asked for, the same value afterwards."""
        if key not in self._kept:
            self._kept[key] = make()
        return cast(T, self._kept[key])

    @property
    def row_sequences(self) -> torch.Tensor:
        """[T] int64: the sequence of each row."""
        return self.once("row_sequences", self._row_sequences)

    def _row_sequences(self) -> torch.Tensor:
        starts = self.inputs.query_starts
        return torch.repeat_interleave(torch.arange(len(starts) - 1), starts.diff())

    def tables(self, table: int) -> torch.Tensor:
        """[B, M] int32: the block tables of that number, one a sequence."""
        count = len(self.inputs.context_lens)
        return self.inputs.block_tables[table * count : (table + 1) * count]

    def slots(self, table: int) -> torch.Tensor:
        """[T] int64: where each row's key and value go in the blocks of that table."""
        count = len(self.inputs.token_ids)
        return self.inputs.slots[table * count : (table + 1) * count]

    @property
    def all_rows(self) -> torch.Tensor:
        """[T] int64: 0, 1, 2, ..."""
        return self.once("all_rows", lambda: torch.arange(len(self.inputs.token_ids)))

    @property
    def longest_context(self) -> int:
        """Tokens; every position of the step is below it."""
        return max(self.inputs.contexts)
