"""Linear layers with quantised weights: quantising on load, and packing for the C kernels."""

import ctypes
from collections.abc import Callable, Sequence
from typing import TypeAlias

import numpy as np

from sagellm.backends.arrays import Array, Floats, empty_in_large_pages
from sagellm.backends.cpu.binding import Binding
from sagellm.backends.cpu.native.c_structs import NativeLinear
from sagellm.backends.cpu.native.library import NativeKernels
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

# Quantises a float weight [N, K] to a number of bits.
Quantise: TypeAlias = Callable[[Array, int], QuantisedWeight]


def quantised_weights(
    binding: Binding, names: Sequence[str], sizes: Sequence[int], size: int, quantise: Quantise
) -> list[QuantisedWeight | Array] | None:
    """The weights `names` of a layer, [sizes[i], size] each, of which at least one is quantised.

    Returns None if all weights are stored in floats and the program has no mode of quantisation.
    """
    stored = [binding.stored(name, rows, size) for name, rows in zip(names, sizes, strict=True)]
    if binding.quantization is None and not any(stored):
        return None
    named = zip(stored, names, sizes, strict=True)
    return [found or _on_load(binding, name, (rows, size), quantise) for found, name, rows in named]


def _on_load(
    binding: Binding, name: str, shape: tuple[int, int], quantise: Quantise
) -> QuantisedWeight | Array:
    weight = binding.weight(name, *shape)
    if binding.quantization is None:
        return weight
    modes = LOGITS_MODES if binding.makes_logits(name) else MODES
    return quantise(weight, modes[binding.quantization].weight_bits)


def row_bits(binding: Binding, weight: QuantisedWeight, is_logits: bool) -> int:
    """The bits of the activation rows that a weight of the program is multiplied by."""
    modes, stored = (LOGITS_MODES, LOGITS_MODE) if is_logits else (MODES, None)
    mode = modes.get(binding.quantization or "", stored)
    return _row_bits(weight.bits, mode, binding.deterministic)


def row_form(binding: Binding, weight: QuantisedWeight, is_logits: bool) -> int | str:
    """The form to which `PackedQuantised` rounds the rows of a weight of the program."""
    bits = row_bits(binding, weight, is_logits)
    is_exact = binding.deterministic or (is_logits and bits == 16)
    return bits if is_exact else f"{bits}_many"


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


def joined(weights: Sequence[QuantisedWeight | Array]) -> QuantisedWeight | None:
    """The weights concatenated along N; None if one is not quantised, or their forms differ."""
    first, *others = weights
    if not isinstance(first, QuantisedWeight):
        return None
    if not all(isinstance(other, QuantisedWeight) and _alike(first, other) for other in others):
        return None
    if not others:
        return first
    alike = [weight for weight in weights if isinstance(weight, QuantisedWeight)]
    zeros = [weight.zeros for weight in alike if weight.zeros is not None]
    codes, scales = (
        np.concatenate([getattr(weight, name) for weight in alike]) for name in ("codes", "scales")
    )
    whole = np.concatenate(zeros) if zeros else None
    return QuantisedWeight(
        first.bits, first.group, codes, scales, whole, first.order, first.has_levels
    )


def _alike(a: QuantisedWeight, b: QuantisedWeight) -> bool:
    """Whether two weights have the same bits, groups and order of k, and both or neither have zeros
    and levels.
    """
    forms = [(one.bits, one.group, one.zeros is None, one.has_levels) for one in (a, b)]
    if forms[0] != forms[1]:
        return False
    if a.order is None or b.order is None:
        return a.order is b.order
    return np.array_equal(a.order, b.order)


BLOCK = 32  # codes along k whose products are summed as integers
_PACKED_AT_ONCE = 4 << 20  # codes, so that the temporaries stay small
_COLUMNS = 16  # columns of a panel; C takes two panels at once, so their number is even
_POINTER = ctypes.c_void_p


class NativeQuant(ctypes.Structure):
    """The C struct `Quant` of quant.h: a `Linear`, the order of k, and the levels of codes."""

    _fields_ = (
        *NativeLinear._fields_,
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
        bias: Floats | None,
        row_form: int | str,
    ) -> None:
        zeros = None if weight.zeros is None else _packed_groups(weight.zeros.astype(np.int16))
        order = None if weight.order is None else np.ascontiguousarray(weight.order, np.int32)
        self.shape = weight.shape
        codes = _packed_codes(weight)
        levels = np.array(LEVELS, np.int8) if weight.has_levels else None
        groups = _packed_groups(weight.scales.astype(np.float16))
        self._kept = (codes, groups, zeros, bias, order, levels)
        numbers, scales, *optional = (_address(array) for array in self._kept)
        kernel = f"sage_quant_{weight.bits}_{row_form}"
        is_gated = kernels.is_gated(*self.shape, quantised=True)
        self._struct = NativeQuant(
            kernels.function(kernel),
            kernels.function(f"{kernel}_gated") if is_gated else None,
            None,
            numbers,
            scales,
            optional[0],
            optional[1],
            *self.shape,
        )
        self._struct.group, self._struct.order = weight.group, optional[2]
        self._struct.levels = optional[3]
        self._kernels = kernels
        self.address = ctypes.addressof(self._struct)

    def __call__(self, rows: Floats, threads: int = 1) -> Floats:
        return self._kernels.linear(self.address, rows, self.shape[0], threads)

    @property
    def num_bytes(self) -> int:
        return sum(array.nbytes for array in self._kept if array is not None)


def _packed_codes(weight: QuantisedWeight) -> Array:
    """The codes [N, K] in the order that C reads: [panel, k / 4, 16, 4]. With 4 bits, the low half
    of a byte holds a code of one group of four along k, and the high half one of the next group.
    """
    num_rows, size = weight.shape
    fours = -(-size // BLOCK) * BLOCK // 4 * weight.bits // 8  # of a row
    num_panels = -(-num_rows // (2 * _COLUMNS)) * 2
    flat = empty_in_large_pages(num_panels * fours * _COLUMNS, np.dtype(np.uint32))
    packed = flat.reshape(num_panels, fours, _COLUMNS)
    step = max(1, _PACKED_AT_ONCE // (2 * _COLUMNS * size)) * 2 * _COLUMNS
    for top in range(0, num_rows, step):
        part = weight.rows(top, top + step)
        panels = packed[top // _COLUMNS : (top + step) // _COLUMNS]
        _pack_part(part.codes, weight.bits, panels)
    return packed


def _pack_part(codes: Array, bits: int, packed: Array) -> None:
    """Pack the codes of some rows into their panels."""
    num_rows, size = codes.shape
    margin = ((0, -num_rows % (2 * _COLUMNS)), (0, -size % BLOCK))
    if np.any(margin):  # padding is multiplied by activations of 0
        codes = np.pad(codes, margin, constant_values=ZERO_CODE[bits])
    fours = np.ascontiguousarray(codes).view(np.uint32)  # four codes move as one number
    panels = fours.reshape(-1, _COLUMNS, fours.shape[1]).transpose(0, 2, 1)
    if bits == 8:
        packed[...] = panels
    else:
        np.bitwise_or(panels[:, 0::2], panels[:, 1::2] << 4, out=packed)


def _packed_groups(of_groups: Array) -> Array:
    """Scales or zeros [N, G] in the order that C reads: [panel, G, 16]."""
    filled = np.pad(of_groups, ((0, -len(of_groups) % (2 * _COLUMNS)), (0, 0)))
    panels = filled.reshape(-1, _COLUMNS, filled.shape[1]).transpose(0, 2, 1)
    return np.ascontiguousarray(panels)


def _address(array: Array | None) -> int | None:
    return None if array is None else array.ctypes.data


# Each try maps the largest number of a group to one of these numbers. Clipping the largest number a
# little makes the other numbers more precise. The levels of 4 bits reach further below 0 than
# above.
TRIES = {
    4: (-127.0, -120.0, -112.0, -104.0, -134.0, -142.0, 113.0, 107.0, 100.0, 119.0, 126.0),
    8: tuple(127.0 + 0.25 * step for step in range(-8, 9)),
}


def quantise(
    kernels: NativeKernels,
    weight: Array,
    bits: int,
    threads: int = 1,
    free: Callable[[], None] | None = None,
) -> QuantisedWeight:
    """Quantise `weight` [N, K], float32 or bfloat16, in groups of 32, without zeros.

    Each group gets the scale with the least squared error. Weights of 4 bits get levels. `free`: as
    in `NativeKernels.pack`.
    """
    made = kernels.quantise(np.ascontiguousarray(weight), bits, TRIES[bits], threads, free)
    return QuantisedWeight(bits, GROUP_SIZE, *made, has_levels=bits == 4)
