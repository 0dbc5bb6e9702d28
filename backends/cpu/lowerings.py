"""The lowering of each kernel of the dialect, in the table `LOWERINGS`: a function on tensors, with
a native form if the C library has one.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F

from sagellm.backends.cpu.attention import attention, quantised, rope_tables, rotated
from sagellm.backends.cpu.binding import Binding, ForwardContext, NativeKernel
from sagellm.backends.cpu.linear import linear
from sagellm.backends.cpu.linear_attention import linear_attention
from sagellm.backends.cpu.quantised_linear import quantised_linear
from sagellm.graphs.kernels.rowwise import Embedding, FusedLinear, Linear, RmsNorm
from sagellm.graphs.kernels.token_mixers import KVWrite, PagedAttention, Rope, RopeKVWrite

# Takes the step's ForwardContext and the tensors of the kernel's inlets; returns its outlets.
BoundKernel: TypeAlias = Callable[..., tuple[torch.Tensor, ...]]
# Makes a kernel from its options and the program's Binding.
Lowering: TypeAlias = Callable[[Any, Binding], BoundKernel]
Tensors: TypeAlias = tuple[torch.Tensor, ...]


def _embedding(options: Embedding, binding: Binding) -> BoundKernel:
    weight = binding.weight(options.weight, options.vocab_size, options.size)
    bfloat = weight.dtype == torch.bfloat16
    fields = {"weight": weight.data_ptr(), "size": options.vocab_size, "bfloat": bfloat}

    def run(step: ForwardContext, ids: torch.Tensor) -> Tensors:
        return (F.embedding(ids, weight).float(),)

    return NativeKernel(run, fields, widths=(options.size,))


def _select_rows(_: object, binding: Binding) -> BoundKernel:
    return NativeKernel(lambda step, rows, chosen: (rows[chosen],))


def _rms_norm(options: RmsNorm, binding: Binding) -> BoundKernel:
    weight = binding.vector(options.weight, options.size)
    if kernels := binding.native:
        size, epsilon = options.size, options.epsilon
        return NativeKernel(
            lambda step, rows: (kernels.rms_norm(rows, weight, size, epsilon),),
            _norm_fields(options, weight),
        )
    return _row_by_row(binding, lambda step, rows: (_normed(rows, weight, options),))


def _add_rms_norm(options: RmsNorm, binding: Binding) -> BoundKernel:
    weight = binding.vector(options.weight, options.size)
    if kernels := binding.native:
        size, epsilon = options.size, options.epsilon
        return NativeKernel(
            lambda step, a, b: kernels.add_rms_norm(a, b, weight, size, epsilon),
            _norm_fields(options, weight),
        )

    def run(step: ForwardContext, a: torch.Tensor, b: torch.Tensor) -> Tensors:
        total = a + b
        return total, _normed(total, weight, options)

    return _row_by_row(binding, run)


def _norm_fields(options: RmsNorm, weight: torch.Tensor) -> dict[str, int | float | None]:
    return {"weight": weight.data_ptr(), "size": options.size, "epsilon": options.epsilon}


def _normed(rows: torch.Tensor, weight: torch.Tensor, options: RmsNorm) -> torch.Tensor:
    # Sizes are given in full: -1 cannot be inferred for 0 rows.
    heads = rows.reshape(len(rows), rows.shape[1] // options.size, options.size)
    return F.rms_norm(heads, (options.size,), weight, options.epsilon).flatten(1)


def _linear(options: Linear, binding: Binding) -> BoundKernel:
    bias = binding.vector(options.bias, options.out_features) if options.bias else None
    sizes = options.out_features, options.in_features
    multiply = quantised_linear(binding, (options.weight,), sizes[:1], sizes[1], bias)
    if multiply is None:
        weight = binding.weight(options.weight, *sizes)
        # Rounded logits could change which of them is the largest.
        multiply = linear(binding, weight, bias, exact=binding.makes_logits(options.weight))
    return _product(lambda step, rows: (multiply(rows),), multiply, sizes[:1])


def _fused_linear(options: FusedLinear, binding: Binding) -> BoundKernel:
    sizes, size = list(options.out_features), options.in_features
    bias = _fused_bias(options, binding)
    multiply = quantised_linear(binding, options.weights, sizes, size, bias)
    if multiply is None:
        multiply = linear(binding, binding.joined(options.weights, sizes, size), bias)
    return _product(lambda step, rows: torch.split(multiply(rows), sizes, 1), multiply, sizes)


def _gated_linear(options: FusedLinear, binding: Binding) -> BoundKernel:
    product, gate = _fused_linear(options, binding), _silu_mul(options, binding)

    def run(step: ForwardContext, rows: torch.Tensor) -> Tensors:
        return gate(step, *product(step, rows))

    if isinstance(product, NativeKernel):
        return NativeKernel(run, product.fields, product.widths[:1], keep=product.keep)
    return run


def _product(run: BoundKernel, multiply: object, widths: Sequence[int]) -> BoundKernel:
    """The kernel `run`, which calls `multiply`; with a native form if `multiply` has an address."""
    address: int | None = getattr(multiply, "address", None)
    if address is None:
        return run
    return NativeKernel(run, {"weight": address}, tuple(widths), keep=multiply)


def _fused_bias(options: FusedLinear, binding: Binding) -> torch.Tensor | None:
    if not any(options.biases):
        return None
    named = zip(options.biases, options.out_features, strict=True)
    return torch.cat([binding.vector(n, size) if n else torch.zeros(size) for n, size in named])


def _rope(options: Rope, binding: Binding) -> BoundKernel:
    tables = rope_tables(options)

    def run(step: ForwardContext, rows: torch.Tensor, positions: torch.Tensor) -> Tensors:
        return (rotated(rows, tables.up_to(step.longest_context), positions),)

    return NativeKernel(run, {"size": options.head_dim}, rope=options)


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

    fields = {"layer": options.layer, "blocks": options.table, "size": options.head_dim}
    return NativeKernel(run, fields)


def _write(layer: torch.Tensor, k: torch.Tensor, v: torch.Tensor, slots: torch.Tensor) -> None:
    """Write rows of k and v to slots in one `layer` of a pool."""
    kv_heads, block_size = layer.shape[2:4]
    block, offset = slots // block_size, slots % block_size
    for side, rows in zip(layer, (k, v), strict=True):
        heads = rows.view(len(rows), kv_heads, rows.shape[1] // kv_heads)
        is_int8 = layer.dtype == torch.int8
        side[block, :, offset] = quantised(heads) if is_int8 else heads.to(layer.dtype)


def _rope_kv_write(options: RopeKVWrite, binding: Binding) -> BoundKernel:
    tables, kernels = rope_tables(options.rope), binding.native

    def run(step: ForwardContext, *inlets: torch.Tensor) -> Tensors:
        q, k, v, positions, _, pool = inlets
        slots = step.slots(options.table)
        angles, layer = tables.up_to(step.longest_context), options.layer
        if kernels:
            places = {"tables": angles, "positions": positions, "slots": slots, "pool": pool}
            return (kernels.rope_kv_write(q, k, v, **places, layer=layer),)
        _write(pool[layer], rotated(k, angles, positions), v, slots)
        return (rotated(q, angles, positions),)

    fields = {"layer": options.layer, "blocks": options.table, "size": options.rope.head_dim}
    return NativeKernel(run, fields, rope=options.rope)


def _paged_attention(options: PagedAttention, binding: Binding) -> BoundKernel:
    attend = attention(options, binding)
    fields = {"layer": options.layer, "blocks": options.table}
    return NativeKernel(lambda step, q, *_: (attend(step, q),), fields, attention=options)


def _silu(_: object, binding: Binding) -> BoundKernel:
    return NativeKernel(_row_by_row(binding, lambda step, rows: (F.silu(rows),)))


def _mul(_: object, binding: Binding) -> BoundKernel:
    return NativeKernel(lambda step, a, b: (a * b,))


def _add(_: object, binding: Binding) -> BoundKernel:
    return NativeKernel(lambda step, a, b: (a + b,))


def _silu_mul(_: object, binding: Binding) -> BoundKernel:
    if kernels := binding.native:
        return NativeKernel(lambda step, gate, up: (kernels.silu_mul(gate, up),))
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
    "linear": _linear,
    "qkv_linear": _fused_linear,
    "gate_up_linear": _fused_linear,
    "gated_linear": _gated_linear,
    "rope": _rope,
    "kv_write": _kv_write,
    "rope_kv_write": _rope_kv_write,
    "paged_attention": _paged_attention,
    "linear_attention": linear_attention,
    "silu": _silu,
    "mul": _mul,
    "add": _add,
    "silu_mul": _silu_mul,
}
