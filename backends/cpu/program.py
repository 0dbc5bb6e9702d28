"""The program that runs a step in one call of C, and the queue, which launches programs and samples
from their logits.
"""

import ctypes
import gc
import importlib
import itertools
import queue
import sys
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from typing import TypeAlias, TypeVar, cast

import numpy as np

from sagellm.backends.arrays import Array, Floats, Integers, dtype_name, empty_in_large_pages
from sagellm.backends.cpu.binding import Binding, NativeKernel
from sagellm.backends.cpu.kv_storage import CpuStorage, stored_dtype
from sagellm.backends.cpu.native import c_structs
from sagellm.backends.cpu.native.library import (
    KV_DTYPES,
    NativeKernels,
    native_kernels,
)
from sagellm.backends.cpu.native.tuning import default_threads
from sagellm.backends.cpu.native_forms import NATIVE_FORMS, NoNativeForm, rope_tables
from sagellm.backends.cpu.translation import Translation, translate
from sagellm.backends.instructions import Instruction, KernelPlan, plan_kernels
from sagellm.backends.interface import KVStorage, LaunchError, Program, Progress, Weights
from sagellm.backends.sampler import Pickers, sample, sample_plain, score
from sagellm.backends.step import KVLayout, Sampled, StepBatch, StepInputs, Ticket, head_dim_of
from sagellm.backends.step_inputs import feed, step_inputs
from sagellm.backends.token_masks import MaskThread
from sagellm.graphs.ir import Graph
from sagellm.graphs.kernels import KERNELS

T = TypeVar("T")
# Allocates logits from the number of rows and the size of the vocabulary.
NewLogits: TypeAlias = Callable[[int, int], Floats]
_MOST_KEPT = 64 << 20  # bytes of logits: 100 rows of a vocabulary of 150,000
_ROWS = 16  # the arena's rows are a multiple of 16, so that each buffer begins at a cache line


def new_logits(num_rows: int, vocab_size: int) -> Floats:
    return np.empty((num_rows, vocab_size), dtype=np.float32)


class LogitsMemory:
    """The memory of a queue's logits, kept from step to step: valid until the next call.

    Freed logits of several sizes would stay in C's allocator.
    """

    def __init__(self) -> None:
        self._kept = np.empty(0, dtype=np.float32)

    def __call__(self, num_rows: int, vocab_size: int) -> Floats:
        size = num_rows * vocab_size
        if size * self._kept.itemsize > _MOST_KEPT:  # the rows of a prompt that is scored
            return new_logits(num_rows, vocab_size)
        if size > len(self._kept):
            self._kept = np.empty(0, dtype=np.float32)  # free it before the next is allocated
            self._kept = empty_in_large_pages(size, self._kept.dtype)
        return self._kept[:size].reshape(num_rows, vocab_size)


class StepProgram:
    """A program of the CPU. Not reentrant: the caller of `run` must hold `lock`."""

    def __init__(self) -> None:
        self.lock = threading.Lock()

    def run(
        self, inputs: StepInputs, pool: Array, threads: int, new_logits: NewLogits = new_logits
    ) -> Floats:
        """Run a step on so many threads: write keys and values of the T new tokens to `pool`, and
        return the logits [R, vocab] float32, perhaps in the memory that `new_logits` allocates.
        """
        raise NotImplementedError

    def largest(self, logits: Floats) -> Integers:
        """For each row of the logits of the last `run`, the index of the first of the largest; of
        the first NaN if there is one.
        """
        found: Integers = logits.argmax(axis=-1)
        return found


class NativeProgram(StepProgram):
    """A program that runs a step in one call of C.

    The arena of activations lives as long as the program, and grows to the largest step.
    """

    def __init__(
        self,
        translation: Translation,
        kernels: NativeKernels,
        plan: KernelPlan,
        uses_tiles: bool = False,
    ) -> None:
        super().__init__()
        self._translation = translation
        self._kernels = kernels
        self._plan = plan
        self._largest: Integers = np.empty(0, dtype=np.int64)
        self._arena = np.empty(0, dtype=np.float32)
        self._heads = (c_structs.NativeHeads * len(translation.attentions))(*translation.attentions)
        self._tables = (ctypes.c_void_p * len(translation.ropes))()
        self._step = c_structs.NativeStep(
            instructions=ctypes.addressof(translation.instructions),
            heads=ctypes.addressof(self._heads),
            tables=ctypes.addressof(self._tables),
            num_instructions=len(translation.instructions),
            num_heads=len(self._heads),
        )
        self._step.batch.tiles = uses_tiles
        # A program has no `close`: engines share it, and the last one to drop it frees C's memory.
        weakref.finalize(self, kernels.close_step, self._step)

    def __str__(self) -> str:
        return f"# in one native call\n{self._plan}"

    def run(
        self, inputs: StepInputs, pool: Array, threads: int, new_logits: NewLogits = new_logits
    ) -> Floats:
        """Run a step. Raises IndexError for a token outside of the vocabulary."""
        num_rows = len(inputs.logit_rows if self._translation.is_chosen else inputs.token_ids)
        logits = new_logits(num_rows, self._translation.num_logits)
        self._step.logits = logits.ctypes.data
        if self._translation.is_chosen:
            self._largest = np.empty(num_rows, dtype=np.int64)
            self._step.largest = self._largest.ctypes.data
        self._grow(max(len(inputs.token_ids), len(inputs.logit_rows)))
        tables = [rope_tables(rope).up_to(max(inputs.contexts)) for rope in self._translation.ropes]
        self._tables[:] = [table.ctypes.data for table in tables]
        self._load(inputs, pool)
        self._kernels.run_step(self._step, threads)
        return logits

    def largest(self, logits: Floats) -> Integers:
        return self._largest if self._translation.is_chosen else super().largest(logits)

    def profile(self, inputs: StepInputs, pool: Array, threads: int) -> list[tuple[str, int]]:
        """Run a step, and return the name and the nanoseconds of each instruction.

        Threads wait for each other after each instruction, so a step takes a little longer than in
        `run`.
        """
        count = len(self._translation.instructions)
        times = (ctypes.c_int64 * (count + 1))()
        self._step.times = ctypes.addressof(times)
        try:
            self.run(inputs, pool, threads)
        finally:
            self._step.times = None
        spans = (end - start for start, end in itertools.pairwise(times))
        return list(zip(self._translation.names, spans, strict=True))

    def _grow(self, num_rows: int) -> None:
        """Grow the arena to at least `num_rows` rows."""
        step = self._step
        if num_rows > step.capacity or step.arena is None:
            step.capacity = -(-num_rows // _ROWS) * _ROWS
            self._arena = np.empty(0, dtype=np.float32)  # free it before the next is allocated
            self._arena = np.empty(step.capacity * self._translation.num_floats, dtype=np.float32)
            step.arena = self._arena.ctypes.data

    def _load(self, inputs: StepInputs, pool: Array) -> None:
        step = self._step
        step.pool = pool.ctypes.data
        step.layer_bytes, step.side_bytes = pool.strides[:2]
        step.kv_heads, block_size = pool.shape[3:5]
        step.head_dim = head_dim_of(pool)
        step.token_ids = inputs.token_ids.ctypes.data
        step.positions = inputs.positions.ctypes.data
        step.slots = inputs.slots.ctypes.data
        step.logit_rows = inputs.logit_rows.ctypes.data
        step.num_rows, step.num_logit_rows = len(inputs.token_ids), len(inputs.logit_rows)
        batch, tables = step.batch, inputs.block_tables
        step.block_tables, batch.table_len = tables.ctypes.data, tables.shape[1]
        batch.num_sequences, batch.block_size = len(inputs.context_lens), block_size
        batch.query_starts = inputs.query_starts.ctypes.data
        batch.context_lens = inputs.context_lens.ctypes.data
        batch.dtype = KV_DTYPES.index(dtype_name(pool.dtype))


def lower(
    graph: Graph,
    weights: Weights,
    *,
    layout: KVLayout,
    dtype: str,
    deterministic: bool,
    quantization: str | None,
    progress: Progress,
    is_native: bool,
) -> StepProgram:
    """Make the program of a graph that has passed all stages of lowering. Raises LoweringError."""
    native = native_kernels(progress) if is_native else None
    plan = plan_kernels(graph)

    def binding() -> Binding:
        how = stored_dtype(dtype), native, deterministic, quantization
        return Binding(graph, weights, layout, *how)

    if native is not None and all(step.node.op in NATIVE_FORMS for step in plan.instructions):
        try:
            return bind(plan, binding())
        except NoNativeForm:
            pass  # weights that were read are read once more
    return lower_to_torch(plan, binding())


def bind(plan: KernelPlan, binding: Binding) -> NativeProgram:
    """Give every instruction its native form and its weights. Raises LoweringError and
    NoNativeForm.
    """
    assert binding.native is not None
    assert binding.queue is not None
    kernels = each_bound(plan, lambda step: _native(step, binding))
    binding.queue.run()
    return NativeProgram(translate(plan, kernels), binding.native, plan, binding.uses_tiles)


def each_bound(plan: KernelPlan, bind_one: Callable[[Instruction], T]) -> tuple[T, ...]:
    """The results of `bind_one` for each instruction, in their order.

    The kernel of the logits is bound first, while few other weights are loaded: its weight is the
    largest, and packing holds a weight in memory twice.
    """
    *others, last = plan.instructions
    head = bind_one(last)
    return (*map(bind_one, others), head)


def _native(step: Instruction, binding: Binding) -> NativeKernel:
    return NATIVE_FORMS[step.node.op](KERNELS[step.node.op].options(step.node), binding)


def lower_to_torch(plan: KernelPlan, binding: Binding) -> StepProgram:
    """Make a program that calls its kernels one by one on torch tensors. Raises LoweringError."""
    _import_torch()
    return cast(
        StepProgram, importlib.import_module("sagellm.backends.cpu.lowerings").bind(plan, binding)
    )


def _import_torch() -> None:
    """Import torch before other modules import it, and freeze its objects.

    Torch makes hundreds of thousands of objects that live until the process ends. Unfrozen, the
    garbage collector would visit them again and again during the import, and at each later
    collection.
    """
    if "torch" in sys.modules or not gc.isenabled():
        return
    gc.collect()  # garbage would be frozen too
    gc.disable()
    try:
        importlib.import_module("torch")
        gc.freeze()
    finally:
        gc.enable()


def pickers(kernels: NativeKernels | None, threads: int) -> Pickers:
    """The functions that pick tokens, in C if there is a library."""
    if kernels is None:
        return Pickers()
    return Pickers(kernels.largest_allowed, partial(kernels.sample_random, threads=threads))


THREAD_NAME = "sagellm-engine"


@dataclass(slots=True, eq=False)
class _Launch:
    program: StepProgram
    storage: CpuStorage
    batch: StepBatch
    inputs: StepInputs
    ticket: "Future[Sampled]" = field(default_factory=Future)


class CpuQueue:
    """The Queue of the CPU: its own thread runs programs and then samples from their logits.

    `threads`: how many threads kernels may use; None: `default_threads`. One thread computes all
    launches, because OpenMP and the C kernels keep a team of threads for each calling thread.
    `launch` makes the inputs on the caller's thread, while the previous launch is computed.
    """

    def __init__(self, threads: int | None = None, *, is_native: bool = True) -> None:
        native = native_kernels() if is_native else None
        self._threads = threads or default_threads(native.tuning.tuned if native else None)
        self._pickers = pickers(native, self._threads)
        self._launches: queue.SimpleQueue[_Launch | None] = queue.SimpleQueue()
        self._masks = MaskThread()
        self._new_logits = LogitsMemory()
        self._thread = threading.Thread(target=self._work, name=THREAD_NAME)
        self._thread.start()

    def launch(self, program: Program, storage: KVStorage, batch: StepBatch) -> Ticket:
        if not isinstance(program, StepProgram):
            raise TypeError(f"the cpu runs programs that it lowered, not {type(program).__name__}")
        if not isinstance(storage, CpuStorage):
            raise TypeError(f"the cpu reads its own pools, not {type(storage).__name__}")
        inputs = step_inputs(batch, storage.layout.block_size)
        launch = _Launch(program, storage, batch, inputs)
        self._launches.put(launch)
        return launch.ticket

    def close(self) -> None:
        self._launches.put(None)
        self._thread.join()
        self._masks.close()

    def _work(self) -> None:
        while (launch := self._launches.get()) is not None:
            if not launch.ticket.set_running_or_notify_cancel():
                continue  # cancelled before it began
            try:
                sampled = self._computed(launch)
            except BaseException as error:  # the ticket raises it; the thread serves later launches
                launch.ticket.set_exception(error)
            else:
                launch.ticket.set_result(sampled)

    def _computed(self, launch: _Launch) -> Sampled:
        """Run the launch's program, and sample from its logits. Raises the errors of the step."""
        batch, inputs, pool = launch.batch, launch.inputs, launch.storage.pool
        if batch.after is not None:
            feed(batch, inputs, _sampled_by(batch.after))
        masks = self._masks.start(() if batch.is_plain else batch.rows)
        try:
            with launch.program.lock:  # queues of other engines may run the same program
                logits = launch.program.run(inputs, pool, self._threads, self._new_logits)
                largest = launch.program.largest(logits)
        finally:
            found = masks.result()  # matchers belong to one thread: none may work past the step
        num_rows = len(batch.rows)
        rows, tokens = logits[:num_rows], largest[:num_rows]
        sampled = sample_plain(rows, tokens) if batch.is_plain else None
        sampled = sampled or sample(rows, batch.rows, found, self._pickers, tokens)
        if batch.scored:
            sampled.prompt_logprobs.extend(score(logits[num_rows:], batch.scored))
        return sampled


def _sampled_by(ticket: Ticket) -> list[int]:
    """The tokens of the previous launch, which has ended. Raises LaunchError if it failed."""
    if ticket.cancelled() or ticket.exception() is not None:
        raise LaunchError("the launch before has failed")
    return ticket.result().token_ids
