"""Linear layers with quantised weights: quantising on load, packing for C, and multiplying."""

import ctypes
import itertools
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch.nn.functional import pad

from sagellm.backends.cpu.binding import Binding
from sagellm.backends.cpu.linear import LinearFunction, linear
from sagellm.backends.cpu.native.library import NativeKernels, in_large_pages
from sagellm.backends.quantised_weight import (
    GROUP_SIZE,
    LEVELS,
    LOGITS_MODE,
    LOGITS_MODES,
    MODES,
    ZERO_CODE,
    QuantisationMode,
    QuantisedWeight,
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
    stored = [binding.stored(name, rows, size) for name, rows in zip(names, sizes, strict=True)]
    if binding.quantization is None and not any(stored):
        return None
    named = zip(stored, names, sizes, strict=True)
    weights = [found or _on_load(binding, name, rows, size) for found, name, rows in named]
    if (joined := _joined(weights)) is not None:
        return _bound_product(binding, joined, bias, binding.makes_logits(names[0]))
    biases = [None] * len(sizes) if bias is None else list(torch.split(bias, list(sizes)))
    parts = [_bound_product(binding, *part, False) for part in zip(weights, biases, strict=True)]
    return lambda rows: torch.cat([part(rows) for part in parts], 1)


def _on_load(binding: Binding, name: str, rows: int, size: int) -> QuantisedWeight | torch.Tensor:
    weight = binding.weight(name, rows, size)
    if binding.quantization is None:
        return weight
    modes = LOGITS_MODES if binding.makes_logits(name) else MODES
    return quantise(weight, modes[binding.quantization].weight_bits, binding.native)


def _bound_product(
    binding: Binding,
    weight: QuantisedWeight | torch.Tensor,
    bias: torch.Tensor | None,
    is_logits: bool,
) -> LinearFunction:
    if isinstance(weight, torch.Tensor):
        return linear(binding, weight, bias, exact=is_logits)
    modes, stored = (LOGITS_MODES, LOGITS_MODE) if is_logits else (MODES, None)
    mode = modes.get(binding.quantization or "", stored)
    bits = _row_bits(weight.bits, mode, binding.deterministic)
    kernels = binding.native
    if kernels is None:
        return dequantising(weight, bias, bits, alone=binding.deterministic)
    is_exact = binding.deterministic or (is_logits and bits == 16)
    return PackedQuantised(kernels, weight, bias, bits if is_exact else f"{bits}_many")


def _row_bits(weight_bits: int, mode: QuantisationMode | None, deterministic: bool) -> int:
    """The bits of the activation rows that a weight is multiplied by.

    A 4-bit weight takes rows of 8 bits, because its own error is larger than theirs. In a
    deterministic program, which must keep the precision of float32, it takes rows of 16 bits. An
    8-bit weight takes the rows of the mode; without a mode (the weight was stored quantised), it
    takes rows of 16 bits.
    """
    if weight_bits == 4:
        return 16 if deterministic else 8
    return mode.row_bits if mode else 16


def _joined(weights: Sequence[QuantisedWeight | torch.Tensor]) -> QuantisedWeight | None:
    """The weights concatenated along N; None if one is not quantised, or their forms differ."""
    first, *others = weights
    if not isinstance(first, QuantisedWeight):
        return None
    if not all(isinstance(other, QuantisedWeight) and _alike(first, other) for other in others):
        return None
    alike = [weight for weight in weights if isinstance(weight, QuantisedWeight)]
    zeros = None if first.zeros is None else torch.cat([one.zeros for one in alike])  # type: ignore[misc]
    codes, scales = (torch.cat([getattr(w, name) for w in alike]) for name in ("codes", "scales"))
    parts = codes, scales, zeros, first.order
    return QuantisedWeight(first.bits, first.group, *parts, first.has_levels)


def _alike(a: QuantisedWeight, b: QuantisedWeight) -> bool:
    """Whether two weights have the same bits, groups and order of k, and both or neither have zeros
    and levels.
    """
    forms = [(one.bits, one.group, one.zeros is None, one.has_levels) for one in (a, b)]
    if forms[0] != forms[1]:
        return False
    if a.order is None or b.order is None:
        return a.order is b.order
    return torch.equal(a.order, b.order)


BLOCK = 32  # codes along k whose products are summed as integers
_COLUMNS = 16  # columns of a panel; C takes two panels at once, so their number is even
_POINTER, _LONG = ctypes.c_void_p, ctypes.c_long


class NativeQuant(ctypes.Structure):
    """The C struct `Quant` of quant.h: a `Linear`, the order of k, and the levels of codes."""

    _fields_ = (
        *((name, _POINTER) for name in ("run", "gated", "weight", "scales", "zeros", "bias")),
        *((name, _LONG) for name in ("num_cols", "k", "group")),
        ("order", _POINTER),
        ("levels", _POINTER),
    )


class PackedQuantised:
    """The product rows [T, K] -> [T, N], float32, in C.

    `row_form`: what rows are rounded to: integers of 8 or 16 bits; "pairs": bfloat16; "8_many" or
    "16_many": bfloat16 where rows are many and that is faster, else 8 or 16 bits. The bits of a row
    do not depend on other rows, except with "many". `address`: the address of the C `Linear`, valid
    while this object lives.
    """

    def __init__(
        self,
        kernels: NativeKernels,
        weight: QuantisedWeight,
        bias: torch.Tensor | None,
        row_form: int | str,
    ) -> None:
        zeros = None if weight.zeros is None else _packed_groups(weight.zeros.short())
        order = None if weight.order is None else weight.order.int().contiguous()
        self.shape = weight.shape
        codes = in_large_pages(_packed_codes(weight))
        levels = torch.tensor(LEVELS, dtype=torch.int8) if weight.has_levels else None
        self._kept = (codes, _packed_groups(weight.scales.half()), zeros, bias, order, levels)
        numbers, scales, *optional = (_address(tensor) for tensor in self._kept)
        run = kernels.function(f"sage_quant_{weight.bits}_{row_form}")
        self._struct = NativeQuant(
            run, None, numbers, scales, optional[0], optional[1], *self.shape
        )
        self._struct.group, self._struct.order = weight.group, optional[2]
        self._struct.levels = optional[3]
        self._kernels = kernels
        self.address = ctypes.addressof(self._struct)

    def __call__(self, rows: torch.Tensor) -> torch.Tensor:
        return self._kernels.linear(self.address, rows, self.shape[0])

    @property
    def num_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self._kept if tensor is not None)


def _packed_codes(weight: QuantisedWeight) -> torch.Tensor:
    """The codes [N, K] in the order that C reads: [panel, k / 4, 16, 4]. With 4 bits, the low half
    of a byte holds a code of one group of four along k, and the high half one of the next group.
    """
    num_rows, size = weight.shape
    fill = ZERO_CODE[weight.bits]  # padding is multiplied by activations of 0
    filled = pad(weight.codes, (0, -size % BLOCK, 0, -num_rows % (2 * _COLUMNS)), value=fill)
    panels = filled.view(-1, _COLUMNS, filled.shape[1] // 4, 4).transpose(1, 2)
    if weight.bits == 8:
        return panels.contiguous()
    low, high = panels[:, 0::2], panels[:, 1::2]
    return (low | (high << 4)).contiguous()


def _packed_groups(of_groups: torch.Tensor) -> torch.Tensor:
    """Scales or zeros [N, G] in the order that C reads: [panel, G, 16]."""
    filled = pad(of_groups, (0, 0, 0, -len(of_groups) % (2 * _COLUMNS)))
    return filled.view(-1, _COLUMNS, filled.shape[1]).transpose(1, 2).contiguous()


def _address(tensor: torch.Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


_LARGEST_CODE = {8: 127, 16: 127 * 256 + 127}  # 16 bits: two signed bytes
_BLOCK_NUMBERS = 1 << 21  # numbers of a block of the weight in float32: 8 MiB fit in the cache


def dequantising(
    weight: QuantisedWeight, bias: torch.Tensor | None, row_bits: int, *, alone: bool
) -> LinearFunction:
    """The product rows [T, K] -> [T, N] in torch, with blocks of the weight in float32.

    `alone`: multiply each row by itself, so that its bits do not depend on the batch. If weight and
    rows both have 8 bits, rows are rounded as in C, so that the mode gives the same results. Other
    rows are not rounded.
    """
    order = None if weight.order is None else weight.order.long()

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
        yield weight.rows(top, top + step).ordered()


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

# Each try maps the largest number of a group to one of these numbers. Clipping the largest number a
# little makes the other numbers more precise. The levels of 4 bits reach further below 0 than
# above.
TRIES = {
    4: (-127.0, -120.0, -112.0, -104.0, -134.0, -142.0, 113.0, 107.0, 100.0, 119.0, 126.0),
    8: tuple(127.0 + 0.25 * step for step in range(-8, 9)),
}
_LARGEST_SCALE = 65504.0  # the largest float16
_LARGEST = 127
_MIDDLES = [(low + high) / 2 for low, high in itertools.pairwise(LEVELS)]


def quantise(
    weight: torch.Tensor, bits: int, kernels: NativeKernels | None = None
) -> QuantisedWeight:
    """Quantise `weight` [N, K], float32 or bfloat16, in groups of 32, without zeros.

    Each group gets the scale with the least squared error. Weights of 4 bits get levels. `kernels`
    None: compute in torch.
    """
    if kernels:
        made = kernels.quantise(weight.contiguous(), bits, TRIES[bits])
        return QuantisedWeight(bits, GROUP_SIZE, *made, has_levels=bits == 4)
    parts = [_quantise_part(part.float(), bits) for part in torch.split(weight, _num_rows(weight))]
    codes, scales = (torch.cat(of_parts) for of_parts in zip(*parts, strict=True))
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
