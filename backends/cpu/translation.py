"""Translates a bound plan to the instructions of the native step: where matrices lie in the arena,
and where threads wait for each other.
"""

import ctypes
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from sagellm.backends.cpu.binding import NativeKernel
from sagellm.backends.cpu.native import c_structs
from sagellm.backends.cpu.native_forms import NoNativeForm
from sagellm.backends.instructions import Instruction, KernelPlan
from sagellm.graphs.kernels import KERNELS, KV
from sagellm.graphs.kernels.token_mixers import PagedAttention, Rope

LOGITS_BUFFER = -1  # stands for the tensor of the logits, which is not in the arena


@dataclass(frozen=True, slots=True)
class BufferSlice:
    """A matrix in a buffer: columns `column` to `column + width` of the buffer's rows."""

    buffer: int
    column: int
    width: int


class Buffers:
    """Allocates the buffers of an arena in the order of a plan, and reuses free buffers.

    A buffer is as wide as the widest group of matrices that it holds at any time.
    """

    def __init__(self) -> None:
        self._widths: list[int] = []
        self._users: list[int] = []

    def take(self, widths: Sequence[int]) -> tuple[BufferSlice, ...]:
        """Allocate matrices of the given widths, side by side in one buffer."""
        buffer = self._free_one(sum(widths))
        self._widths[buffer] = max(self._widths[buffer], sum(widths))
        self._users[buffer] = len(widths)
        columns = [sum(widths[:index]) for index in range(len(widths))]
        pairs = zip(columns, widths, strict=True)
        return tuple(BufferSlice(buffer, column, width) for column, width in pairs)

    def drop(self, place: BufferSlice) -> None:
        """Free a matrix. Its buffer becomes free when all its matrices have been freed."""
        if place.buffer != LOGITS_BUFFER:
            self._users[place.buffer] -= 1

    def stride(self, buffer: int) -> int:
        """The width of a buffer: floats from one row to the next."""
        return self._widths[buffer]

    def firsts(self) -> tuple[int, ...]:
        """The offset of each buffer, in floats per row of the arena. The last entry is the sum of
        all widths.
        """
        return tuple(sum(self._widths[:index]) for index in range(len(self._widths) + 1))

    def _free_one(self, width: int) -> int:
        """The narrowest free buffer that is wide enough, or else the widest free buffer, or else a
        new buffer.
        """
        free = [index for index, users in enumerate(self._users) if users == 0]
        wide = [index for index in free if self._widths[index] >= width]
        if wide:
            return min(wide, key=self._widths.__getitem__)
        if free:
            return max(free, key=self._widths.__getitem__)
        self._widths.append(0)
        self._users.append(0)
        return len(self._widths) - 1


_LINEAR, _GATED = "linear", "gated_linear"
_OPS = (  # in the order of step.h
    *("embedding", "select_rows", "rms_norm", "add_rms_norm", _LINEAR, _GATED, "rope"),
    *("kv_write", "rope_kv_write", "paged_attention", "add", "mul", "silu", "silu_mul"),
)
_SAME = {"qkv_linear": _LINEAR, "gate_up_linear": _LINEAR}  # C's LINEAR may have several results
_IN_PLACE = ("add", "mul", "silu", "silu_mul", "add_rms_norm")  # may overwrite their first inlet
# Inlets that C reads from the step's inputs, each with the only input that may be wired to it.
_STEP_PORTS = {
    ("embedding", "in"): "token_ids",
    ("select_rows", "rows"): "logit_rows",
    **{
        (op, name): name
        for op in ("rope", "kv_write", "rope_kv_write", "paged_attention")
        for name in ("positions", "slots", "query_starts", "context_lens", "block_tables", KV)
    },
}
_EVERY_ROW = ("rope", "kv_write", "rope_kv_write", "paged_attention")  # need all T rows


@dataclass(frozen=True, slots=True)
class Translation:
    """A plan in native form. `instructions` point to memory that `kernels` keep alive.

    The arena needs `num_floats` floats per row. `ropes` and `attentions`: the distinct options; the
    field `table` of an instruction is an index into one of them. `names`: the node of each
    instruction, for profiles.
    """

    instructions: "ctypes.Array[c_structs.NativeInstruction]"
    kernels: tuple[NativeKernel, ...]
    ropes: tuple[Rope, ...]
    attentions: tuple[c_structs.NativeHeads, ...]
    names: tuple[str, ...]
    num_floats: int
    num_logits: int
    is_chosen: bool  # logits are computed for the rows in `logit_rows` only, not for all T rows


@dataclass(frozen=True, slots=True)
class _Value:
    """A matrix of floats. `chosen`: it has R rows, as the logits; otherwise it has T rows."""

    place: BufferSlice
    chosen: bool


def translate(plan: KernelPlan, kernels: Sequence[NativeKernel]) -> Translation:
    """The native form of a plan. `kernels`: the native form of each instruction.

    Raises NoNativeForm if an inlet that C reads from the step's inputs is wired to another value.
    """
    translator = _Translator(plan)
    for step, kernel in zip(plan.instructions, kernels, strict=True):
        translator.add(step, kernel)
    return translator.translation(tuple(kernels))


class _Translator:
    """Assigns places to the matrices of a plan, instruction by instruction, then writes the C
    structs.
    """

    def __init__(self, plan: KernelPlan) -> None:
        self._plan = plan
        self._buffers = Buffers()
        self._values: dict[int, _Value] = {}
        self._steps: list[tuple[NativeKernel, str, list[_Value], list[_Value]]] = []
        self._ropes: dict[Rope, int] = {}
        self._attentions: dict[PagedAttention, int] = {}

    def add(self, step: Instruction, kernel: NativeKernel) -> None:
        """Translate the next instruction of the plan. Raises NoNativeForm."""
        op = _SAME.get(step.node.op, step.node.op)
        if op not in _OPS:
            raise NoNativeForm(f"{op} is no instruction")
        registers = list(self._activations(step))
        inlets = [self._value(index) for index in registers]
        if op in _EVERY_ROW and any(value.chosen for value in inlets):
            raise NoNativeForm(f"{step.node.name} reads rows of logits")
        outlets = self._outlets(step, kernel, op, registers, inlets)
        scratch = self._scratch(op, outlets)
        for index in step.dead:
            if index in self._values:
                self._buffers.drop(self._values.pop(index).place)
        self._values.update(zip(step.outputs, outlets, strict=True))
        self._steps.append((kernel, op, inlets, [*outlets, *scratch]))

    def _activations(self, step: Instruction) -> Iterable[int]:
        """The registers of the inlets that take matrices.

        Raises NoNativeForm if another inlet is not wired to the step input that C reads.
        """
        ports = KERNELS[step.node.op].spec.inlets
        for port, index in zip(ports, step.inputs, strict=True):
            expected = _STEP_PORTS.get((step.node.op, port.name))
            if expected is None:
                yield index
            elif index != self._plan.step_inputs[expected]:
                raise NoNativeForm(f"{step.node.name}.{port.name} is not {expected}")

    def _value(self, register: int) -> _Value:
        if register not in self._values:
            raise NoNativeForm("a kernel reads an input of the step in another way")
        return self._values[register]

    def _outlets(
        self,
        step: Instruction,
        kernel: NativeKernel,
        op: str,
        registers: Sequence[int],
        inlets: Sequence[_Value],
    ) -> list[_Value]:
        chosen = op == "select_rows" or any(value.chosen for value in inlets)
        widths = kernel.widths or tuple(inlets[0].place.width for _ in step.outputs)
        if step is self._plan.instructions[-1]:
            if step.outputs != (self._plan.logits,):
                raise NoNativeForm("logits are not the last result")
            return [_Value(BufferSlice(LOGITS_BUFFER, 0, widths[0]), chosen)]
        if op in (_LINEAR, _GATED):
            return [_Value(place, chosen) for place in self._buffers.take(widths)]
        places = [] if op == "kv_write" else [*self._over(step, op, registers)]
        for width in widths[len(places) : len(step.outputs)]:
            places += self._buffers.take([width])
        return [_Value(place, chosen) for place in places]

    def _scratch(self, op: str, outlets: Sequence[_Value]) -> list[_Value]:
        """Memory that a kernel needs besides its results. No later kernel reads it, so it is freed
        at once.
        """
        if op != _GATED:
            return []
        (place,) = self._buffers.take([2 * outlets[0].place.width])
        self._buffers.drop(place)
        return [_Value(place, outlets[0].chosen)]

    def _over(self, step: Instruction, op: str, registers: Sequence[int]) -> Iterable[BufferSlice]:
        """The place of the first inlet, if the kernel may write its result there: the op works in
        place, and nothing else reads the inlet.
        """
        first = registers[0] if registers else -1
        if op in _IN_PLACE and first in step.dead and registers.count(first) == 1:
            yield self._values.pop(first).place

    def translation(self, kernels: tuple[NativeKernel, ...]) -> Translation:
        """Write the C structs of the whole plan. Call it after the last `add`."""
        firsts = self._buffers.firsts()
        made = (c_structs.NativeInstruction * len(self._steps))()
        touched = _Touched()
        for target, (kernel, op, inlets, outlets) in zip(made, self._steps, strict=True):
            for name, value in kernel.fields.items():
                setattr(target, name, value)
            target.op = _OPS.index(op)
            target.chosen = any(value.chosen for value in outlets)
            target.width = (outlets or inlets)[0].place.width
            target.table = self._table(kernel)
            for views, values in ((target.inlets, inlets), (target.outlets, outlets)):
                for view, held in zip(views, values, strict=False):
                    self._locate(view, held.place, firsts)
            target.waits = touched.must_wait(op, inlets, outlets)
        (logits,) = self._steps[-1][3]
        kinds = tuple(map(_heads, self._attentions))
        ropes = tuple(self._ropes)
        names = tuple(step.node.name for step in self._plan.instructions)
        sizes = (firsts[-1], logits.place.width, logits.chosen)
        return Translation(made, kernels, ropes, kinds, names, *sizes)

    def _table(self, kernel: NativeKernel) -> int:
        if kernel.rope:
            return self._ropes.setdefault(kernel.rope, len(self._ropes))
        if kernel.attention:
            return self._attentions.setdefault(_kind(kernel.attention), len(self._attentions))
        return 0

    def _locate(
        self, view: c_structs.NativeView, place: BufferSlice, firsts: Sequence[int]
    ) -> None:
        if place.buffer == LOGITS_BUFFER:
            view.first, view.column, view.width = -1, 0, place.width
            return
        view.first, view.column = firsts[place.buffer], place.column
        view.width = self._buffers.stride(place.buffer)


class _Touched:
    """The buffers that kernels read and wrote since all threads last waited for each other."""

    def __init__(self) -> None:
        self._read: set[int] = set()
        self._written: set[int] = set()

    def must_wait(self, op: str, inlets: Sequence[_Value], outlets: Sequence[_Value]) -> bool:
        """Whether threads must wait before this kernel: it touches a buffer that another kernel
        wrote since the last wait, or writes a buffer that another kernel read since then.
        """
        read = {value.place.buffer for value in inlets}
        written = {value.place.buffer for value in outlets}
        clash = self._written & (read | written) or self._read & written
        # Attention always waits: it reads the pool, which is not tracked here, and its threads take
        # pieces of work from one counter.
        waits = bool(clash) or op == "paged_attention"
        if waits:
            self._read, self._written = set(), set()
        self._read |= read
        self._written |= written
        return waits


def _kind(options: PagedAttention) -> PagedAttention:
    """The options without layer and table: equal for all layers with the same attention."""
    return PagedAttention(
        0,
        options.num_heads,
        options.num_kv_heads,
        options.head_dim,
        options.scale,
        options.window,
    )


def _heads(options: PagedAttention) -> c_structs.NativeHeads:
    sizes = (options.num_heads, options.num_kv_heads, options.head_dim)
    return c_structs.NativeHeads(*sizes, options.window or 0, options.scale)
