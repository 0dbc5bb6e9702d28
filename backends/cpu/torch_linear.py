"""Linear layers in torch, with float or quantised weights: ways to multiply, chosen by CPU, dtype
and determinism; and quantising on load without a C compiler.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import TypeAlias

import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.functional import pad

from sagellm.backends.arrays import BFLOAT16, Array, Floats
from sagellm.backends.cpu.binding import Binding
from sagellm.backends.cpu.linear import pack
from sagellm.backends.cpu.native.library import NativeKernels
from sagellm.backends.cpu.quantised_linear import (
    BLOCK,
    TRIES,
    PackedQuantised,
    joined,
    quantise,
    quantised_weights,
    row_bits,
    row_form,
)
from sagellm.backends.quantised_weight import GROUP_SIZE, LEVELS, QuantisedWeight


def tensor(values: Array) -> torch.Tensor:
    """A tensor that shares the memory of an array."""
    if values.dtype == BFLOAT16:
        return torch.from_numpy(values.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(values)


def array(values: torch.Tensor) -> Array:
    """An array that shares the memory of a tensor."""
    if values.dtype == torch.bfloat16:
        return values.view(torch.int16).numpy().view(BFLOAT16)
    found: Array = values.numpy()
    return found


LinearFunction: TypeAlias = Callable[[torch.Tensor], torch.Tensor]  # rows [T, K] -> [T, N], float32

_BLOCK_NUMBERS = 1 << 21  # numbers of a block of the weight in float32: 8 MiB fit in the cache


def linear(
    binding: Binding, weight: torch.Tensor, bias: torch.Tensor | None, *, exact: bool = False
) -> LinearFunction:
    """The fastest product with weight [N, K] and bias [N] float32 on this CPU.

    If the CPU multiplies bfloat16, rows are rounded to bfloat16 before they are multiplied by a
    bfloat16 weight. oneDNN, which is used without the C kernels, rounds its results to bfloat16
    too; `exact` forbids oneDNN then.
    """
    if binding.native:
        return native(binding.native, weight, bias, tiles=binding.uses_tiles)
    if binding.deterministic:
        return row_by_row(weight, bias)
    is_wide = weight.dtype == torch.float32
    if is_wide or (not exact and has_bfloat16_products()):
        return packed(weight, bias) if torch._C._has_mkldnn else plain(weight, bias)
    return upcast(weight, bias)


def has_bfloat16_products() -> bool:
    """Whether oneDNN multiplies bfloat16 natively here, by AVX512-BF16 or AMX.

    On older CPUs oneDNN accepts bfloat16 too, but is slower than in float32.
    """
    has_products = _cpu_has("avx512_bf16") or _cpu_has("amx_tile")
    return bool(torch._C._has_mkldnn) and has_products


def _cpu_has(feature: str) -> bool:
    """Whether torch reports the CPU feature. A feature unknown to torch counts as absent."""
    return bool(getattr(torch.cpu, f"_is_{feature}_supported", bool)())


def plain(weight: torch.Tensor, bias: torch.Tensor | None) -> LinearFunction:
    """The product by torch."""
    return lambda rows: F.linear(rows, weight, bias)


def gelu_linear(
    binding: Binding, weight: torch.Tensor, bias: torch.Tensor | None
) -> LinearFunction:
    """The operator `linear`, with gelu of the product."""
    is_free = binding.native is None and not binding.deterministic
    if is_free and weight.dtype == torch.float32 and torch._C._has_mkldnn:
        return packed(weight, bias, "gelu")
    product = linear(binding, weight, bias)
    return lambda rows: F.gelu(product(rows))


def packed(weight: torch.Tensor, bias: torch.Tensor | None, then: str = "none") -> LinearFunction:
    """The product by oneDNN with a weight that oneDNN packed: three times faster for few rows.

    `then`: what oneDNN makes of each number of the product, "none" or "gelu".
    """
    dtype = weight.dtype
    order = torch.ops.mkldnn._reorder_linear_weight(weight, 8)  # 8: the expected number of rows
    offset = None if bias is None else bias.to(dtype)

    def run(rows: torch.Tensor) -> torch.Tensor:
        product = torch.ops.mkldnn._linear_pointwise(
            rows.to(dtype).contiguous(), order, offset, then, [], "none"
        )
        return torch.Tensor.float(product)

    return run


def native(
    kernels: NativeKernels, weight: torch.Tensor, bias: torch.Tensor | None, *, tiles: bool = False
) -> LinearFunction:
    """The product by the C kernel: without tiles, the same bits for any number of rows."""
    offset, threads = None if bias is None else array(bias), torch.get_num_threads()
    return by_kernel(pack(kernels, array(weight), offset, threads=threads, tiles=tiles))


def by_kernel(product: Callable[[Floats, int], Floats]) -> LinearFunction:
    """A product of the C library as a function on tensors, with as many threads as torch uses."""
    return lambda rows: torch.from_numpy(product(array(rows), torch.get_num_threads()))


def upcast(weight: torch.Tensor, bias: torch.Tensor | None) -> LinearFunction:
    """The product in float32. Each call converts the weight block by block, to save memory."""
    blocks = torch.split(weight, max(1, _BLOCK_NUMBERS // weight.shape[1]))
    scratch = torch.empty(0)

    def run(rows: torch.Tensor) -> torch.Tensor:
        scratch.resize_(blocks[0].shape)
        out = torch.empty(len(rows), len(weight))
        top = 0
        for block in blocks:
            wide = scratch[: len(block)].copy_(block)
            torch.mm(rows, wide.T, out=out[:, top : top + len(block)])
            top += len(block)
        return out if bias is None else out.add_(bias)

    return run


def row_by_row(weight: torch.Tensor, bias: torch.Tensor | None) -> LinearFunction:
    """One product per row, each on memory of the same alignment: the same bits in any batch."""
    wide = weight.float()
    return lambda rows: torch.cat(
        [F.linear(row.clone(), wide, bias) for row in torch.split(rows, 1)]
    )


def quantised_linear(
    binding: Binding,
    names: Sequence[str],
    sizes: Sequence[int],
    size: int,
    bias: torch.Tensor | None,
) -> LinearFunction | None:
    """The product rows [T, size] -> [T, sum(sizes)] with the concatenated weights `names`.

    Returns None if all weights are stored in floats and the program has no mode of quantisation.
    """
    kernels, threads = binding.native, torch.get_num_threads()

    def make(weight: Array, bits: int) -> QuantisedWeight:
        return (
            quantise(kernels, weight, bits, threads) if kernels else quantised(tensor(weight), bits)
        )

    weights = quantised_weights(binding, names, sizes, size, make)
    if weights is None:
        return None
    if (whole := joined(weights)) is not None:
        return _bound_product(binding, whole, bias, binding.makes_logits(names[0]))
    biases = [None] * len(sizes) if bias is None else list(torch.split(bias, list(sizes)))
    parts = [_bound_product(binding, *part, False) for part in zip(weights, biases, strict=True)]
    return lambda rows: torch.cat([part(rows) for part in parts], 1)


def _bound_product(
    binding: Binding,
    weight: QuantisedWeight | Array,
    bias: torch.Tensor | None,
    is_logits: bool,
) -> LinearFunction:
    if not isinstance(weight, QuantisedWeight):
        return linear(binding, tensor(weight), bias, exact=is_logits)
    kernels = binding.native
    if kernels is None:
        bits = row_bits(binding, weight, is_logits)
        return dequantising(weight, bias, bits, alone=binding.deterministic)
    offset = None if bias is None else array(bias)
    return by_kernel(PackedQuantised(kernels, weight, offset, row_form(binding, weight, is_logits)))


_LARGEST_CODE = {8: 127, 16: 127 * 256 + 127}  # 16 bits: two signed bytes


def dequantising(
    weight: QuantisedWeight, bias: torch.Tensor | None, row_bits: int, *, alone: bool
) -> LinearFunction:
    """The product rows [T, K] -> [T, N] in torch, with blocks of the weight in float32.

    `alone`: multiply each row by itself, so that its bits do not depend on the batch. If weight and
    rows both have 8 bits, rows are rounded as in C, so that the mode gives the same results. Other
    rows are not rounded.
    """
    order = None if weight.order is None else tensor(weight.order).long()

    def run(rows: torch.Tensor) -> torch.Tensor:
        given = rows if order is None else rows[:, order]
        if weight.bits == row_bits == 8:
            given = rounded(given)
        parts = torch.split(given, 1) if alone else (given,)
        blocks = [
            [F.linear(part.clone(), wide) for part in parts] for wide in _float_blocks(weight)
        ]
        out = torch.cat([torch.cat(block) for block in blocks], 1)
        return out if bias is None else out.add_(bias)

    return run


def _float_blocks(weight: QuantisedWeight) -> Iterator[torch.Tensor]:
    """Blocks of the weight's rows in float32. Their columns have the order of the codes."""
    step = max(1, _BLOCK_NUMBERS // weight.shape[1])
    for top in range(0, weight.shape[0], step):
        yield tensor(weight.rows(top, top + step).ordered())


def rounded(rows: torch.Tensor, bits: int = 8) -> torch.Tensor:
    """The rows [T, K] as the C kernels see them: rounded to `bits` with a scale for each 32
    numbers, in float32.
    """
    size, top = rows.shape[1], _LARGEST_CODE[bits]
    blocks = pad(rows, (0, -size % BLOCK)).view(len(rows), -1, BLOCK)
    most = blocks.abs().amax(-1, keepdim=True)
    codes = (blocks * torch.where(most > 1e-30, top / most, 0.0)).round()
    seen: torch.Tensor = (codes * (most / top)).flatten(1)[:, :size]
    return seen


_NUMBERS_AT_ONCE = 1 << 18  # numbers of a weight, so that the temporaries of a try fit in the cache

_LARGEST_SCALE = 65504.0  # the largest float16
_LARGEST = 127
_MIDDLES = [(low + high) / 2 for low, high in itertools.pairwise(LEVELS)]


def quantised(weight: torch.Tensor, bits: int) -> QuantisedWeight:
    """Quantise `weight` [N, K], float32 or bfloat16, in groups of 32, without zeros, as C does.

    Each group gets the scale with the least squared error. Weights of 4 bits get levels.
    """
    parts = [_quantise_part(part.float(), bits) for part in torch.split(weight, _num_rows(weight))]
    codes, scales = (torch.cat(of_parts).numpy() for of_parts in zip(*parts, strict=True))
    return QuantisedWeight(bits, GROUP_SIZE, codes, scales, has_levels=bits == 4)


def _num_rows(weight: torch.Tensor) -> int:
    return max(1, _NUMBERS_AT_ONCE // weight.shape[1])


def _quantise_part(weight: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    groups = pad(weight, (0, -weight.shape[1] % GROUP_SIZE)).view(len(weight), -1, GROUP_SIZE)
    scales = _best_scales(groups, bits).half()
    if bits == 4:
        codes = _level_numbers(groups, scales.float()).byte()
    else:
        codes = _values(groups, scales.float(), bits).char()
    return codes.flatten(1)[:, : weight.shape[1]], scales.squeeze(-1)


def _best_scales(groups: torch.Tensor, bits: int) -> torch.Tensor:
    """The scales [N, G, 1] with the least squared error. Candidates are the tries, and the
    least-squares fit to the codes of the best try.
    """
    largest = groups.gather(-1, groups.abs().argmax(-1, keepdim=True))
    best = _stored(largest / TRIES[bits][0])
    error = _error(groups, best, bits)
    for code in TRIES[bits][1:]:
        best, error = _better(groups, _stored(largest / code), best, error, bits)
    codes = _values(groups, best, bits)
    fit = (groups * codes).sum(-1, True) / (codes.square().sum(-1, True) + 1e-30)
    return _better(groups, _stored(fit), best, error, bits)[0]


def _stored(scales: torch.Tensor) -> torch.Tensor:
    """Round scales to float16, in which they are stored: codes must be chosen for stored scales."""
    return scales.clamp(-_LARGEST_SCALE, _LARGEST_SCALE).half().float()


def _better(
    groups: torch.Tensor, scales: torch.Tensor, best: torch.Tensor, error: torch.Tensor, bits: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """For each group, the one of `scales` and `best` with the smaller error, and that error.

    `error`: the error of `best`.
    """
    found = _error(groups, scales, bits)
    is_less = found < error
    return torch.where(is_less, scales, best), torch.where(is_less, found, error)


def _error(groups: torch.Tensor, scales: torch.Tensor, bits: int) -> torch.Tensor:
    return (_values(groups, scales, bits) * scales - groups).square().sum(-1, True)


def _values(groups: torch.Tensor, scales: torch.Tensor, bits: int) -> torch.Tensor:
    """The numbers that the nearest codes stand for, to be multiplied by the scales."""
    if bits == 4:
        return torch.tensor(LEVELS, dtype=torch.float32)[_level_numbers(groups, scales)]
    return _scaled(groups, scales).round().clamp(-_LARGEST, _LARGEST)


def _level_numbers(groups: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    return torch.searchsorted(torch.tensor(_MIDDLES), _scaled(groups, scales))


def _scaled(groups: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    return groups * torch.where(scales.abs() > 1e-30, 1 / scales, 0.0)
