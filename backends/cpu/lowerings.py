"""The program that calls its kernels one by one on torch tensors, and the table `LOWERINGS`, which
makes such a call of each kernel of the dialect.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F

from sagellm.backends.arrays import Array, Floats
from sagellm.backends.cpu.attention import (
    ForwardContext,
    attention,
    linear_attention,
    quantised,
)
from sagellm.backends.cpu.binding import Binding
from sagellm.backends.cpu.native_forms import fused_bias, rope_tables
from sagellm.backends.cpu.packed_sequences import packed_attention, pool
from sagellm.backends.cpu.program import NewLogits, StepProgram, each_bound, new_logits
from sagellm.backends.cpu.torch_linear import array, gelu_linear, linear, quantised_linear, tensor
from sagellm.backends.instructions import Instruction, KernelPlan
from sagellm.backends.step import StepInputs
from sagellm.graphs.kernels import KERNELS, KV
from sagellm.graphs.kernels.rowwise import Embedding, FusedLinear, LayerNorm, Linear, RmsNorm
from sagellm.graphs.kernels.token_mixers import KVWrite, PagedAttention, Rope, RopeKVWrite

# Takes the step's ForwardContext and the tensors of the kernel's inlets; returns its outlets.
BoundKernel: TypeAlias = Callable[..., tuple[torch.Tensor, ...]]
# Makes a kernel from its options and the program's Binding.
Lowering: TypeAlias = Callable[[Any, Binding], BoundKernel]
Tensors: TypeAlias = tuple[torch.Tensor, ...]
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


class CpuProgram(StepProgram):
    """A program that calls its kernels one by one. Its inputs, its pool and its logits are numpy
    arrays, as those of NativeProgram.

    The program holds the weights; the caller owns the pool.
    """

    def __init__(self, calls: tuple[KernelCall, ...], plan: KernelPlan) -> None:
        super().__init__()
        self._calls = calls
        self._plan = plan

    def __str__(self) -> str:
        return str(self._plan)

    @torch.no_grad()
    def run(
        self, inputs: StepInputs, pool: Array, threads: int, new_logits: NewLogits = new_logits
    ) -> Floats:
        """Run a step. From now on, torch uses as many threads for this thread."""
        if torch.get_num_threads() != threads:
            torch.set_num_threads(threads)  # OpenMP keeps this number for the calling thread
        step = ForwardContext(inputs, pool)
        registers = self._load(inputs, step.pool)
        for call in self._calls:
            results = call.kernel(step, *(registers[index] for index in call.inputs))
            for index, result in zip(call.outputs, results, strict=True):
                registers[index] = result
            for index in call.dead:
                registers[index] = _EMPTY
        return array(registers[self._plan.logits])

    def _load(self, inputs: StepInputs, pool: torch.Tensor) -> list[torch.Tensor]:
        registers = [_EMPTY] * self._plan.num_registers
        for name, index in self._plan.step_inputs.items():
            if name == KV:
                registers[index] = pool
            elif (given := getattr(inputs, name)) is not None:
                registers[index] = tensor(given)
        return registers


def _embedding(options: Embedding, binding: Binding) -> BoundKernel:
    weight = tensor(binding.weight(options.weight, options.vocab_size, options.size))
    table = weight[options.first :]
    return lambda step, ids: (F.embedding(ids, table).float(),)


def _select_rows(_: object, binding: Binding) -> BoundKernel:
    return lambda step, rows, chosen: (rows[chosen],)


def _rms_norm(options: RmsNorm, binding: Binding) -> BoundKernel:
    weight = binding.vector(options.weight, options.size)
    if kernels := binding.native:
        how = weight, options.size, options.epsilon

        def native(step: ForwardContext, rows: torch.Tensor) -> Tensors:
            found = kernels.rms_norm(array(rows), *how, torch.get_num_threads())
            return (torch.from_numpy(found),)

        return native
    scale = tensor(weight)
    return _row_by_row(binding, lambda step, rows: (_normed(rows, scale, options),))


def _add_rms_norm(options: RmsNorm, binding: Binding) -> BoundKernel:
    weight = binding.vector(options.weight, options.size)
    if kernels := binding.native:
        how = weight, options.size, options.epsilon

        def native(step: ForwardContext, a: torch.Tensor, b: torch.Tensor) -> Tensors:
            found = kernels.add_rms_norm(array(a), array(b), *how, torch.get_num_threads())
            return tuple(map(torch.from_numpy, found))

        return native
    scale = tensor(weight)

    def run(step: ForwardContext, a: torch.Tensor, b: torch.Tensor) -> Tensors:
        total = a + b
        return total, _normed(total, scale, options)

    return _row_by_row(binding, run)


def _normed(rows: torch.Tensor, weight: torch.Tensor, options: RmsNorm) -> torch.Tensor:
    # Sizes are given in full: -1 cannot be inferred for 0 rows.
    heads = rows.reshape(len(rows), rows.shape[1] // options.size, options.size)
    return F.rms_norm(heads, (options.size,), weight, options.epsilon).flatten(1)


def _layer_norm(options: LayerNorm, binding: Binding) -> BoundKernel:
    """`layer_norm` of one inlet, or `add_layer_norm` of two."""
    weight, bias = (
        tensor(binding.vector(name, options.size)) for name in (options.weight, options.bias)
    )
    shape = (options.size,)

    def run(step: ForwardContext, *inlets: torch.Tensor) -> Tensors:
        rows = inlets[0] if len(inlets) == 1 else inlets[0] + inlets[1]
        return (F.layer_norm(rows, shape, weight, bias, options.epsilon),)

    return _row_by_row(binding, run)


def _unit_norm(_: object, binding: Binding) -> BoundKernel:
    return lambda step, rows: (F.normalize(rows, dim=1),)


def _gelu_linear(options: Linear, binding: Binding) -> BoundKernel:
    bias = tensor(binding.vector(options.bias, options.out_features)) if options.bias else None
    weight = binding.weight(options.weight, options.out_features, options.in_features)
    product = gelu_linear(binding, tensor(weight), bias)
    return _row_by_row(binding, lambda step, rows: (product(rows),))


def _linear(options: Linear, binding: Binding) -> BoundKernel:
    bias = tensor(binding.vector(options.bias, options.out_features)) if options.bias else None
    sizes = options.out_features, options.in_features
    multiply = quantised_linear(binding, (options.weight,), sizes[:1], sizes[1], bias)
    if multiply is None:
        weight = tensor(binding.weight(options.weight, *sizes))
        # Rounded logits could change which of them is the largest.
        multiply = linear(binding, weight, bias, exact=binding.makes_logits(options.weight))
    product = multiply
    return lambda step, rows: (product(rows),)


def _fused_linear(options: FusedLinear, binding: Binding) -> BoundKernel:
    sizes, size = list(options.out_features), options.in_features
    biases = fused_bias(options, binding)
    bias = None if biases is None else tensor(biases)
    multiply = quantised_linear(binding, options.weights, sizes, size, bias)
    if multiply is None:
        weight = tensor(binding.joined(options.weights, sizes, size))
        multiply = linear(binding, weight, bias)
    product = multiply
    return lambda step, rows: torch.split(product(rows), sizes, 1)


def _gated_linear(options: FusedLinear, binding: Binding) -> BoundKernel:
    product, gate = _fused_linear(options, binding), _silu_mul(options, binding)
    return lambda step, rows: gate(step, *product(step, rows))


def _rope(options: Rope, binding: Binding) -> BoundKernel:
    tables = rope_tables(options)

    def run(step: ForwardContext, rows: torch.Tensor, positions: torch.Tensor) -> Tensors:
        return (_rotated(rows, tensor(tables.up_to(step.longest_context)), positions),)

    return run


def _rotated(rows: torch.Tensor, tables: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Rotate every head of rows [T, heads * head_dim]: its halves (a, b) become
    (a cos - b sin, b cos + a sin).
    """
    cosine, sine = tables[positions][:, None].unbind(2)  # [T, 1, head_dim / 2]
    first, second = rows.reshape(len(rows), -1, 2, tables.shape[2]).unbind(2)
    turned = (first * cosine - second * sine, second * cosine + first * sine)
    return torch.stack(turned, 2).flatten(1)


def _kv_write(options: KVWrite, binding: Binding) -> BoundKernel:
    def run(
        step: ForwardContext,
        k: torch.Tensor,
        v: torch.Tensor,
        slots: torch.Tensor,
        pool: torch.Tensor,
    ) -> Tensors:
        _write(pool[options.layer], k, v, step.slots(options.table))
        return ()

    return run


def _write(layer: torch.Tensor, k: torch.Tensor, v: torch.Tensor, slots: torch.Tensor) -> None:
    """Write rows of k and v to slots in one `layer` of a pool."""
    kv_heads, block_size = layer.shape[2:4]
    block, offset = slots // block_size, slots % block_size
    for side, rows in zip(layer, (k, v), strict=True):
        heads = rows.reshape(len(rows), kv_heads, rows.shape[1] // kv_heads)
        is_int8 = layer.dtype == torch.int8
        side[block, :, offset] = quantised(heads) if is_int8 else heads.to(layer.dtype)


def _rope_kv_write(options: RopeKVWrite, binding: Binding) -> BoundKernel:
    tables, kernels = rope_tables(options.rope), binding.native

    def run(step: ForwardContext, *inlets: torch.Tensor) -> Tensors:
        q, k, v, positions, _, pool = inlets
        slots = step.slots(options.table)
        angles, layer = tables.up_to(step.longest_context), options.layer
        if kernels:
            at = {"positions": array(positions), "slots": array(slots), "pool": array(pool)}
            parts = array(q), array(k), array(v)
            found = kernels.rope_kv_write(*parts, tables=angles, **at, layer=layer)
            return (torch.from_numpy(found),)
        _write(pool[layer], _rotated(k, tensor(angles), positions), v, slots)
        return (_rotated(q, tensor(angles), positions),)

    return run


def _paged_attention(options: PagedAttention, binding: Binding) -> BoundKernel:
    attend = attention(options, binding)
    return lambda step, q, *_: (attend(step, q),)


def _gelu(_: object, binding: Binding) -> BoundKernel:
    return _row_by_row(binding, lambda step, rows: (F.gelu(rows),))


def _tanh(_: object, binding: Binding) -> BoundKernel:
    return _row_by_row(binding, lambda step, rows: (torch.tanh(rows),))


def _silu(_: object, binding: Binding) -> BoundKernel:
    return _row_by_row(binding, lambda step, rows: (F.silu(rows),))


def _mul(_: object, binding: Binding) -> BoundKernel:
    return lambda step, a, b: (a * b,)


def _add(_: object, binding: Binding) -> BoundKernel:
    return lambda step, a, b: (a + b,)


def _silu_mul(_: object, binding: Binding) -> BoundKernel:
    if kernels := binding.native:

        def native(step: ForwardContext, gate: torch.Tensor, up: torch.Tensor) -> Tensors:
            found = kernels.silu_mul(array(gate), array(up), torch.get_num_threads())
            return (torch.from_numpy(found),)

        return native
    return _row_by_row(binding, lambda step, gate, up: (F.silu(gate) * up,))


def _row_by_row(binding: Binding, kernel: BoundKernel) -> BoundKernel:
    """`kernel` itself. In a deterministic program, a kernel that calls it row by row, so that the
    bits of a row do not depend on the other rows of the batch.
    """
    if not binding.deterministic:
        return kernel

    def run(step: ForwardContext, *inlets: torch.Tensor) -> Tensors:
        rows = zip(*(torch.split(inlet, 1) for inlet in inlets), strict=True)
        # `clone` gives each row the same alignment, on which the choice of vector code depends.
        results = [kernel(step, *(part.clone() for part in row)) for row in rows]
        return tuple(torch.cat(parts) for parts in zip(*results, strict=True))

    return run


LOWERINGS: Mapping[str, Lowering] = {
    "embedding": _embedding,
    "select_rows": _select_rows,
    "rms_norm": _rms_norm,
    "add_rms_norm": _add_rms_norm,
    "layer_norm": _layer_norm,
    "add_layer_norm": _layer_norm,
    "unit_norm": _unit_norm,
    "linear": _linear,
    "gelu_linear": _gelu_linear,
    "qkv_linear": _fused_linear,
    "gate_up_linear": _fused_linear,
    "gated_linear": _gated_linear,
    "rope": _rope,
    "kv_write": _kv_write,
    "rope_kv_write": _rope_kv_write,
    "paged_attention": _paged_attention,
    "linear_attention": linear_attention,
    "packed_attention": packed_attention,
    "pool": pool,
    "gelu": _gelu,
    "tanh": _tanh,
    "silu": _silu,
    "mul": _mul,
    "add": _add,
    "silu_mul": _silu_mul,
}


def bind(plan: KernelPlan, binding: Binding) -> CpuProgram:
    """Give every instruction its kernel and its weights. Raises LoweringError."""
    return CpuProgram(each_bound(plan, lambda step: _call(step, binding)), plan)


def _call(step: Instruction, binding: Binding) -> KernelCall:
    kernel = LOWERINGS[step.node.op](KERNELS[step.node.op].options(step.node), binding)
    return KernelCall(kernel, step.inputs, step.outputs, step.dead)
