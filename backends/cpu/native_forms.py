"""The native form of each kernel that the C library has, in the table `NATIVE_FORMS`; and tables of
rotary position embeddings.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any, TypeAlias

import numpy as np

from sagellm.backends.arrays import BFLOAT16, Array, Floats
from sagellm.backends.cpu.binding import Binding, NativeKernel
from sagellm.backends.cpu.linear import PackedLinear, pack
from sagellm.backends.cpu.native.library import NativeKernels
from sagellm.backends.cpu.native.tuning import default_threads
from sagellm.backends.cpu.quantised_linear import (
    PackedQuantised,
    joined,
    quantise,
    quantised_weights,
    row_form,
)
from sagellm.backends.quantised_weight import QuantisedWeight
from sagellm.graphs.kernels.rowwise import Embedding, FusedLinear, Linear, RmsNorm
from sagellm.graphs.kernels.token_mixers import KVWrite, PagedAttention, Rope, RopeKVWrite

# Makes the native form of a kernel from its options and a Binding with C kernels. Raises
# NoNativeForm.
NativeForm: TypeAlias = Callable[[Any, Binding], NativeKernel]

_FLOAT_ROWS, _BFLOAT_ROWS, _PACKED = range(3)  # TableForm of rows.h
_FEWEST = 256  # positions of the smallest table


class NoNativeForm(Exception):
    """The kernel or the plan has no native form; torch can run it."""


class RopeTables:
    """Cosines and sines by position: [positions, 2, head_dim / 2] float32, grown by doubling.

    Angles are float32 products, as in transformers, so that far positions agree with its results.
    """

    def __init__(self, options: Rope) -> None:
        self._frequencies = frequencies(options)
        self._tables = self._made(_FEWEST)

    def up_to(self, num_positions: int) -> Floats:
        """The tables, grown to at least `num_positions` positions."""
        tables = self._tables  # read once: another engine's thread may set shorter ones meanwhile
        if num_positions > len(tables):
            tables = self._tables = self._made(1 << (num_positions - 1).bit_length())
        return tables

    def _made(self, num_positions: int) -> Floats:
        angles = np.outer(np.arange(num_positions, dtype=np.float32), self._frequencies)
        wide = angles.astype(np.float64)
        return np.stack([np.cos(wide), np.sin(wide)], 1).astype(np.float32)


@cache
def rope_tables(options: Rope) -> RopeTables:
    """The tables for `options`, which all layers and programs share."""
    return RopeTables(options)


def frequencies(options: Rope) -> Floats:
    """The angle in radians by which one position turns each pair, scaled: [head_dim / 2]."""
    steps = np.arange(0, options.head_dim, 2, dtype=np.float32) / np.float32(options.head_dim)
    plain = (1.0 / np.power(options.theta, steps.astype(np.float64))).astype(np.float32)
    if options.scaling == "linear":
        return plain / np.float32(options.factor)
    return _llama3(plain, options) if options.scaling == "llama3" else plain


def _llama3(plain: Floats, options: Rope) -> Floats:
    """Scale low frequencies, keep high ones, and interpolate between them (Llama 3.1 release)."""
    turns = options.original_max_len / (2 * math.pi / plain)  # full turns in the original context
    low, high = options.low_freq_factor, options.high_freq_factor
    kept = ((turns - low) / (high - low)).clip(0.0, 1.0)
    scaled = (1 - kept) * plain / options.factor + kept * plain
    return scaled.astype(np.float32)


def _kernels(binding: Binding) -> NativeKernels:
    if binding.native is None:
        raise NoNativeForm("there is no C library")
    return binding.native


def _embedding(options: Embedding, binding: Binding) -> NativeKernel:
    shape = options.vocab_size, options.size
    packed = binding.packed(options.weight, *shape)
    if packed is not None:  # no second copy beside that of the logits
        fields = {"weight": packed.address, "size": shape[0], "table_form": _PACKED}
        return NativeKernel(fields, shape[1:], keep=packed)
    weight = binding.weight(options.weight, *shape)
    form = _BFLOAT_ROWS if weight.dtype == BFLOAT16 else _FLOAT_ROWS
    fields = {"weight": weight.ctypes.data, "size": shape[0], "table_form": form}
    return NativeKernel(fields, shape[1:], keep=weight)


def _rms_norm(options: RmsNorm, binding: Binding) -> NativeKernel:
    weight = binding.vector(options.weight, options.size)
    fields = {"weight": weight.ctypes.data, "size": options.size, "epsilon": options.epsilon}
    return NativeKernel(fields, keep=weight)


def _linear(options: Linear, binding: Binding) -> NativeKernel:
    bias = binding.vector(options.bias, options.out_features) if options.bias else None
    sizes = (options.out_features,)
    return _product(binding, (options.weight,), sizes, options.in_features, bias)


def _fused_linear(options: FusedLinear, binding: Binding) -> NativeKernel:
    bias = fused_bias(options, binding)
    return _product(binding, options.weights, options.out_features, options.in_features, bias)


def _gated_linear(options: FusedLinear, binding: Binding) -> NativeKernel:
    product = _fused_linear(options, binding)
    return NativeKernel(product.fields, product.widths[:1], keep=product.keep)


def _product(
    binding: Binding, names: Sequence[str], sizes: Sequence[int], size: int, bias: Floats | None
) -> NativeKernel:
    """The product with the concatenated weights `names`."""
    packed = _packed(binding, names, sizes, size, bias)
    return NativeKernel({"weight": packed.address}, tuple(sizes), keep=packed)


def _packed(
    binding: Binding, names: Sequence[str], sizes: Sequence[int], size: int, bias: Floats | None
) -> PackedLinear | PackedQuantised:
    kernels = _kernels(binding)
    threads = default_threads(kernels.tuning.tuned)

    def make(weight: Array, bits: int) -> QuantisedWeight:
        return quantise(kernels, weight, bits, threads, binding.give_back)

    is_logits = binding.makes_logits(names[0])
    weights = quantised_weights(binding, names, sizes, size, make)
    if weights is None:
        first, *others = binding.parts(names, sizes, size)
        queue, tiles = binding.queue, binding.uses_tiles
        packed = pack(kernels, first, bias, others=others, tiles=tiles, queue=queue)
        if len(names) == 1:
            binding.keep_packed(names[0], packed)
        return packed
    weight = joined(weights)
    if weight is None:
        raise NoNativeForm("the weights of a layer have different forms")
    return PackedQuantised(kernels, weight, bias, row_form(binding, weight, is_logits))


def fused_bias(options: FusedLinear, binding: Binding) -> Floats | None:
    """The concatenated biases, with zeros for a linear without bias; None if none has one."""
    if not any(options.biases):
        return None
    named = zip(options.biases, options.out_features, strict=True)
    return np.concatenate(
        [binding.vector(n, size) if n else np.zeros(size, np.float32) for n, size in named]
    )


def _rope(options: Rope, binding: Binding) -> NativeKernel:
    return NativeKernel({"size": options.head_dim}, rope=options)


def _kv_write(options: KVWrite, binding: Binding) -> NativeKernel:
    fields = {"layer": options.layer, "blocks": options.table, "size": options.head_dim}
    return NativeKernel(fields)


def _rope_kv_write(options: RopeKVWrite, binding: Binding) -> NativeKernel:
    fields = {"layer": options.layer, "blocks": options.table, "size": options.rope.head_dim}
    return NativeKernel(fields, rope=options.rope)


def _paged_attention(options: PagedAttention, binding: Binding) -> NativeKernel:
    return NativeKernel({"layer": options.layer, "blocks": options.table}, attention=options)


def _plain(_: object, binding: Binding) -> NativeKernel:
    return NativeKernel()


NATIVE_FORMS: Mapping[str, NativeForm] = {
    "embedding": _embedding,
    "select_rows": _plain,
    "rms_norm": _rms_norm,
    "add_rms_norm": _rms_norm,
    "linear": _linear,
    "qkv_linear": _fused_linear,
    "gate_up_linear": _fused_linear,
    "gated_linear": _gated_linear,
    "rope": _rope,
    "kv_write": _kv_write,
    "rope_kv_write": _rope_kv_write,
    "paged_attention": _paged_attention,
    "silu": _plain,
    "mul": _plain,
    "add": _plain,
    "silu_mul": _plain,
}
