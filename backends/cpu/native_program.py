"""A program that runs a whole step in one call of C."""

import ctypes
import itertools
import threading
import weakref

import torch

from sagellm.backends.cpu.native import structs
from sagellm.backends.cpu.native.library import NativeKernels
from sagellm.backends.cpu.rope import rope_tables
from sagellm.backends.cpu.translation import Translation
from sagellm.backends.step import StepInputs

_ROWS = 16  # a multiple of it has each buffer begin at a cache line


class NativeProgram:
    """Keeps the arena of its buffers between steps; it grows with the rows of a step.

    `on_tensors` is the same program kernel by kernel, which it shows. Whoever runs it takes `turn`.
    """

    def __init__(
        self, translation: Translation, kernels: NativeKernels, on_tensors: object
    ) -> None:
        self.turn = threading.Lock()
        self._translation = translation
        self._kernels = kernels
        self._on_tensors = on_tensors
        self._arena = torch.empty(0)
        self._heads = (structs.Heads * len(translation.attentions))(*translation.attentions)
        self._tables = (ctypes.c_void_p * len(translation.ropes))()
        self._step = structs.Step(
            instructions=ctypes.addressof(translation.instructions),
            heads=ctypes.addressof(self._heads),
            tables=ctypes.addressof(self._tables),
            num_instructions=len(translation.instructions),
            num_heads=len(self._heads),
        )
        weakref.finalize(self, kernels.close_step, self._step)

    def __str__(self) -> str:
        return f"# in one native call\n{self._on_tensors}"

    @torch.no_grad()
    def run(self, inputs: StepInputs, pool: torch.Tensor) -> torch.Tensor:
        """Float32 logits [R, vocab]; keys and values of the T rows are in `pool` afterwards.

        Raises IndexError for a token outside of the vocabulary.
        """
        num_rows = len(inputs.logit_rows if self._translation.is_chosen else inputs.token_ids)
        logits = torch.empty(num_rows, self._translation.num_logits)
        self._step.logits = logits.data_ptr()
        self._grow(max(len(inputs.token_ids), len(inputs.logit_rows)))
        tables = [rope_tables(rope).up_to(max(inputs.contexts)) for rope in self._translation.ropes]
        self._tables[:] = [table.data_ptr() for table in tables]
        self._load(inputs, pool)
        self._kernels.run_step(self._step)
        return logits

    def profile(self, inputs: StepInputs, pool: torch.Tensor) -> list[tuple[str, int]]:
        """Nanoseconds that each instruction of one such step takes, waits for all threads between.

        For a look at where time goes: the step is a little slower than `run`.
        """
        count = len(self._translation.instructions)
        times = (ctypes.c_int64 * (count + 1))()
        self._step.times = ctypes.addressof(times)
        try:
            self.run(inputs, pool)
        finally:
            self._step.times = None
        spans = (end - start for start, end in itertools.pairwise(times))
        return list(zip(self._translation.names, spans, strict=True))

    def _grow(self, num_rows: int) -> None:
        """Buffers for at least so many rows."""
        step = self._step
        if num_rows > step.capacity or step.arena is None:
            step.capacity = -(-num_rows // _ROWS) * _ROWS
            self._arena = torch.empty(0)  # the old one goes before the new one comes
            self._arena = torch.empty(step.capacity * self._translation.num_floats)
            step.arena = self._arena.data_ptr()

    def _load(self, inputs: StepInputs, pool: torch.Tensor) -> None:
        step, size = self._step, pool.element_size()
        step.pool = pool.data_ptr()
        step.layer_bytes, step.side_bytes = pool.stride(0) * size, pool.stride(1) * size
        _, _, _, step.kv_heads, block_size, step.head_dim = pool.shape
        step.token_ids = inputs.token_ids.data_ptr()
        step.positions = inputs.positions.data_ptr()
        step.slots = inputs.slots.data_ptr()
        step.logit_rows = inputs.logit_rows.data_ptr()
        step.num_rows, step.num_logit_rows = len(inputs.token_ids), len(inputs.logit_rows)
        batch = step.batch
        step.block_tables, batch.table_len = (
            inputs.block_tables.data_ptr(),
            inputs.block_tables.shape[1],
        )
        batch.num_sequences, batch.block_size = len(inputs.context_lens), block_size
        batch.query_starts = inputs.query_starts.data_ptr()
        batch.context_lens = inputs.context_lens.data_ptr()
        batch.bfloat = pool.dtype == torch.bfloat16
