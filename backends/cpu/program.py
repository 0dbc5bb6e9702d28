"""A bound plan: a flat list of kernel calls over a register file."""

import threading
from dataclasses import dataclass

import torch

from sagellm.backends.cpu.binding import Binding
from sagellm.backends.cpu.native.library import native_kernels
from sagellm.backends.cpu.native_program import NativeProgram
from sagellm.backends.cpu.rules import RULES, BoundKernel
from sagellm.backends.cpu.step import Step
from sagellm.backends.cpu.storage import torch_dtype
from sagellm.backends.cpu.translation import UntranslatableError, translate
from sagellm.backends.plan import Instruction, Plan, plan
from sagellm.backends.progress import Progress
from sagellm.backends.protocol import Weights
from sagellm.backends.step import KVLayout, StepInputs
from sagellm.graphs.ir import Graph
from sagellm.graphs.kernels import KERNELS, KV


@dataclass(frozen=True, slots=True)
class Call:
    """One kernel with its weights, and the registers it reads, fills and leaves dead."""

    kernel: BoundKernel
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    dead: tuple[int, ...]


class CpuProgram:
    """Runs its calls in order. Holds the weights; the pool is the caller's.

    Not reentrant: whoever runs it takes `turn`.
    """

    def __init__(self, calls: tuple[Call, ...], plan: Plan) -> None:
        self.turn = threading.Lock()
        self._calls = calls
        self._plan = plan

    def __str__(self) -> str:
        return str(self._plan)

    @torch.no_grad()
    def run(self, inputs: StepInputs, pool: torch.Tensor) -> torch.Tensor:
        """Float32 logits [R, vocab]; keys and values of the T rows are in `pool` afterwards."""
        step = Step(inputs, pool)
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


def lowered(
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
    """The program of a graph that has passed all stages. Raises LoweringError."""
    native = native_kernels(progress) if is_native else None
    how = torch_dtype(dtype), native, deterministic, quantization
    return bind(plan(graph), Binding(graph, weights, layout, *how))


def bind(planned: Plan, binding: Binding) -> CpuProgram | NativeProgram:
    """Give every instruction its kernel and its weights. Raises LoweringError.

    The native step runs the plan where every kernel has a form for it.
    """
    # What makes the logits comes first: its weight is the largest, and in memory twice while it is
    # copied, when as yet little else is there.
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
    return NativeProgram(translation, binding.native, program)


def _call(step: Instruction, binding: Binding) -> Call:
    kernel = RULES[step.node.op](KERNELS[step.node.op].options(step.node), binding)
    return Call(kernel, step.inputs, step.outputs, step.dead)


_EMPTY = torch.empty(0)
