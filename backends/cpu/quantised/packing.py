"""Quantised weights in the order of the C kernels, and the struct that they are called with."""

import ctypes

import torch
from torch.nn.functional import pad

from sagellm.backends.cpu.large_pages import in_large_pages
from sagellm.backends.cpu.native.library import NativeKernels
from sagellm.backends.quantised import ZERO, QuantisedWeight

BLOCK = 32  # codes along k whose products are summed as whole numbers
_COLUMNS = 16  # of a panel; their number is even
_POINTER, _LONG = ctypes.c_void_p, ctypes.c_long


class Quant(ctypes.Structure):
    """`Quant` of quant.c: a `Linear`, and the order of k."""

    _fields_ = (
        *((name, _POINTER) for name in ("run", "gated", "weight", "scales", "zeros", "bias")),
        *((name, _LONG) for name in ("num_cols", "k", "group")),
        ("order", _POINTER),
    )


class Packed:
    """rows [T, K] float32 -> [T, N] float32: the same bits for a row whatever rows are beside it.

    Makes `row_bits` (8 or 16) of each number of a row. A C `Linear` is at `address`, which points
    into tensors that live as long as this does.
    """

    def __init__(
        self,
        kernels: NativeKernels,
        weight: QuantisedWeight,
        bias: torch.Tensor | None,
        row_bits: int,
    ) -> None:
        zeros = None if weight.zeros is None else _groups(weight.zeros.short())
        order = None if weight.order is None else weight.order.int().contiguous()
        self.shape = weight.shape
        codes = in_large_pages(_codes(weight))
        self._kept = (codes, _groups(weight.scales.half()), zeros, bias, order)
        numbers, scales, *optional = (_address(tensor) for tensor in self._kept)
        run = kernels.function(f"sage_quant_{weight.bits}_{row_bits}")
        self._struct = Quant(run, None, numbers, scales, optional[0], optional[1], *self.shape)
        self._struct.group, self._struct.order = weight.group, optional[2]
        self._kernels = kernels
        self.address = ctypes.addressof(self._struct)

    def __call__(self, rows: torch.Tensor) -> torch.Tensor:
        return self._kernels.linear(self.address, rows, self.shape[0])

    @property
    def num_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self._kept if tensor is not None)


def _codes(weight: QuantisedWeight) -> torch.Tensor:
    """[N, K] -> [panel, k / 4, 16, 4]; in 4 bits two fours along k share the bytes of one."""
    num_rows, size = weight.shape
    fill = ZERO[weight.bits]  # its product with an activation of 0 is 0, whatever it is
    filled = pad(weight.codes, (0, -size % BLOCK, 0, -num_rows % (2 * _COLUMNS)), value=fill)
    panels = filled.view(-1, _COLUMNS, filled.shape[1] // 4, 4).transpose(1, 2)
    if weight.bits == 8:
        return panels.contiguous()
    low, high = panels[:, 0::2], panels[:, 1::2]
    return (low | (high << 4)).contiguous()


def _groups(of_groups: torch.Tensor) -> torch.Tensor:
    """[N, G] -> [panel, G, 16]."""
    filled = pad(of_groups, (0, 0, 0, -len(of_groups) % (2 * _COLUMNS)))
    return filled.view(-1, _COLUMNS, filled.shape[1]).transpose(1, 2).contiguous()


def _address(tensor: torch.Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()
