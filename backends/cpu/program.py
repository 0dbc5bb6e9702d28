"""CPU programs, which run a step kernel by kernel or in one call of C, and the queue, which
launches programs and samples from their logits.
"""

import ctypes
import itertools
import queue
import threading
import weakref
from concurrent.futures import Future
from dataclasses import dataclass, field

import torch

from sagellm.backends.cpu.attention import rope_tables
from sagellm.backends.cpu.binding import Binding, ForwardContext
from sagellm.backends.cpu.kv_storage import CpuStorage, torch_dtype
from sagellm.backends.cpu.lowerings import LOWERINGS, BoundKernel
from sagellm.backends.cpu.native import c_structs
from sagellm.backends.cpu.native.library import NativeKernels, native_kernels
from sagellm.backends.cpu.translation import Translation, UntranslatableError, translate
from sagellm.backends.instructions import Instruction, KernelPlan, plan_kernels
from sagellm.backends.interface import KVStorage, LaunchError, Program, Progress, Weights
from sagellm.backends.sampler import sample, score
from sagellm.backends.step import KVLayout, Sampled, StepBatch, StepInputs, Ticket
from sagellm.backends.step_inputs import feed, step_inputs
from sagellm.backends.token_masks import LargestAllowed, MaskThread, largest_allowed
from sagellm.graphs.ir import Graph
from sagellm.graphs.kernels import KERNELS, KV

_ROWS = 16  # the arena's rows are a multiple of 16, so that each buffer begins at a cache line
_EMPTY = torch.empty(0)


@dataclass(frozen=True, slots=True)
class KernelCall:
    """A bound kernel with the registers that it reads, the ones that it fills, and the ones whose
    values are dead after it.
    """

    kernel: BoundKernel
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    dead: tuple[int, ...]


class CpuProgram:
    """A program that calls its kernels one by one on torch tensors.

    The program holds the weights; the caller owns the pool. Not reentrant: the caller of `run` must
    hold `lock`.
    """

    def __init__(self, calls: tuple[KernelCall, ...], plan: KernelPlan) -> None:
        self.lock = threading.Lock()
        self._calls = calls
        self._plan = plan

    def __str__(self) -> str:
        return str(self._plan)

    @torch.no_grad()
    def run(self, inputs: StepInputs, pool: torch.Tensor) -> torch.Tensor:
        """Run a step: write keys and values of the T new tokens to `pool`, and return the logits
        [R, vocab] float32.
        """
        step = ForwardContext(inputs, pool)
        registers = self._load(inputs, pool)
        for call in self._calls:
            results = call.kernel(step, *(registers[index] for index in call.inputs))
            for index, result in zip(call.outputs, results, strict=True):
                registers[index] = result
            for index in call.dead:
                registers[index] = _EMPTY
        return registers[self._plan.logits]

    def _load(self, inputs: StepInputs, pool: torch.Tensor) -> list[torch.Tensor]:
        registers = [_EMPTY] * self._plan.num_registers
        for name, index in self._plan.step_inputs.items():
            registers[index] = pool if name == KV else getattr(inputs, name)
        return registers


class NativeProgram:
    """A program that runs a step in one call of C.

    The arena of activations lives as long as the program, and grows to the largest step.
    `on_tensors`: the CpuProgram of the same plan, for `str`. Not reentrant: the caller of `run`
    must hold `lock`.
    """

    def __init__(
        self,
        translation: Translation,
        kernels: NativeKernels,
        on_tensors: object,
        uses_tiles: bool = False,
    ) -> None:
        self.lock = threading.Lock()
        self._translation = translation
        self._kernels = kernels
        self._on_tensors = on_tensors
        self._arena = torch.empty(0)
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
        return f"# in one native call\n{self._on_tensors}"

    @torch.no_grad()
    def run(self, inputs: StepInputs, pool: torch.Tensor) -> torch.Tensor:
        """Run a step: write keys and values of the T new tokens to `pool`, and return the logits
        [R, vocab] float32.

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
        """Run a step, and return the name and the nanoseconds of each instruction.

        Threads wait for each other after each instruction, so a step takes a little longer than in
        `run`.
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
        """Grow the arena to at least `num_rows` rows."""
        step = self._step
        if num_rows > step.capacity or step.arena is None:
            step.capacity = -(-num_rows // _ROWS) * _ROWS
            self._arena = torch.empty(0)  # free the old arena before the new one is allocated
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
) -> CpuProgram | NativeProgram:
    """Make the program of a graph that has passed all stages of lowering. Raises LoweringError."""
    native = native_kernels(progress) if is_native else None
    how = torch_dtype(dtype), native, deterministic, quantization
    return bind(plan_kernels(graph), Binding(graph, weights, layout, *how))


def bind(planned: KernelPlan, binding: Binding) -> CpuProgram | NativeProgram:
    """Give every instruction its kernel and its weights. Raises LoweringError.

    The program is native if every kernel has a native form.
    """
    # The kernel of the logits is bound first, while few other weights are loaded: its weight is the
    # largest, and packing holds a weight in memory twice.
    *others, last = planned.instructions
    head = _call(last, binding)
    calls = (*(_call(step, binding) for step in others), head)
    program = CpuProgram(calls, planned)
    if not binding.native:
        return program
    try:
        translation = translate(planned, [call.kernel for call in calls])
    except UntranslatableError:
        return program
    return NativeProgram(translation, binding.native, program, binding.uses_tiles)


def _call(step: Instruction, binding: Binding) -> KernelCall:
    kernel = LOWERINGS[step.node.op](KERNELS[step.node.op].options(step.node), binding)
    return KernelCall(kernel, step.inputs, step.outputs, step.dead)


THREAD_NAME = "sagellm-engine"


@dataclass(slots=True, eq=False)
class _Launch:
    program: CpuProgram | NativeProgram
    storage: CpuStorage
    batch: StepBatch
    inputs: StepInputs
    ticket: "Future[Sampled]" = field(default_factory=Future)


class CpuQueue:
    """The Queue of the CPU: its own thread runs programs and then samples from their logits.

    `threads`: how many threads kernels may use; None: torch's default. One thread computes all
    launches, because OpenMP and the C kernels keep a team of threads for each calling thread.
    `launch` makes the inputs on the caller's thread, while the previous launch is computed.
    """

    def __init__(self, threads: int | None = None, *, is_native: bool = True) -> None:
        native = native_kernels() if is_native else None
        self._largest = native.largest_allowed if native else largest_allowed
        self._launches: queue.SimpleQueue[_Launch | None] = queue.SimpleQueue()
        self._masks = MaskThread()
        self._thread = threading.Thread(target=self._work, args=(threads,), name=THREAD_NAME)
        self._thread.start()

    def launch(self, program: Program, storage: KVStorage, batch: StepBatch) -> Ticket:
        if not isinstance(program, CpuProgram | NativeProgram):
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

    def _work(self, threads: int | None) -> None:
        if threads is not None:
            torch.set_num_threads(threads)  # OpenMP keeps this number for the calling thread
        while (launch := self._launches.get()) is not None:
            if not launch.ticket.set_running_or_notify_cancel():
                continue  # cancelled before it began
            try:
                sampled = _computed(launch, self._masks, self._largest)
            except BaseException as error:  # the ticket raises it; the thread serves later launches
                launch.ticket.set_exception(error)
            else:
                launch.ticket.set_result(sampled)


@torch.inference_mode()
def _computed(launch: _Launch, mask_thread: MaskThread, largest: LargestAllowed) -> Sampled:
    """Run the launch's program, and sample from its logits. Raises the errors of the step."""
    batch, inputs = launch.batch, launch.inputs
    if batch.after is not None:
        feed(batch, inputs, _sampled_by(batch.after))
    masks = mask_thread.start(batch.rows)
    try:
        with launch.program.lock:  # queues of other engines may run the same program
            logits = launch.program.run(inputs, launch.storage.pool)
    finally:
        found = masks.result()  # matchers belong to one thread: none may work past the step
    num_rows = len(batch.rows)
    sampled = sample(logits[:num_rows], batch.rows, found, largest)
    if batch.scored:
        sampled.prompt_logprobs.extend(score(logits[num_rows:], batch.scored))
    return sampled


def _sampled_by(ticket: Ticket) -> list[int]:
    """The tokens of the previous launch, which has ended. Raises LaunchError if it failed."""
    if ticket.cancelled() or ticket.exception() is not None:
        raise LaunchError("the launch before has failed")
    return ticket.result().token_ids
