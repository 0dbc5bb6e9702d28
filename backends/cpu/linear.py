"""Linear layers with float weights, packed for the C kernels."""

import ctypes
from collections.abc import Callable

from sagellm.backends.arrays import BFLOAT16, Array, Floats
from sagellm.backends.cpu.native.c_structs import NativeLinear
from sagellm.backends.cpu.native.library import NativeKernels, PanelKind


class PackedLinear:
    """Multiplies rows [T, K] by a packed weight in a C kernel. The result is [T, N].

    Rows may be strided, but the elements of a row are contiguous. `kernel` names a `multiply`
    function of the library, `gated` its gated form, and `row` a `look_up` function, which reads a
    row of the weight; `weight` has the order of these kernels. `address`: the address of the C
    `NativeLinear`, valid while this object lives.
    """

    def __init__(
        self,
        kernels: NativeKernels,
        kernel: str,
        weight: Array,
        shape: tuple[int, int],
        *,
        gated: str | None = None,
        row: str | None = None,
        bias: Floats | None = None,
    ) -> None:
        self.shape = shape  # N, K
        self._kernels = kernels
        self._kept = (weight, bias)  # the struct points into their memory
        optional = (kernels.function(name) if name else None for name in (gated, row))
        self._struct = NativeLinear(kernels.function(kernel), *optional, weight.ctypes.data)
        self._struct.bias = None if bias is None else bias.ctypes.data
        self._struct.num_cols, self._struct.k = shape
        self.address = ctypes.addressof(self._struct)

    def __call__(self, rows: Floats, threads: int = 1) -> Floats:
        return self._kernels.linear(self.address, rows, self.shape[0], threads)


def pack(
    kernels: NativeKernels,
    weight: Array,
    bias: Floats | None,
    kind: PanelKind | None = None,
    threads: int = 1,
    free: Callable[[], None] | None = None,
    *,
    tiles: bool = False,
) -> PackedLinear:
    """The product with a packed copy of `weight` [N, K], float32 or bfloat16.

    `kind` None: the fastest kind on this CPU for the dtype. "pairs" rounds the rows to bfloat16.
    `free`: as in `NativeKernels.pack`. `tiles`: whether tiles multiply these pairs where there are
    enough rows.
    """
    if kind is None:
        bfloat: PanelKind = "pairs" if kernels.has_pairs else "bfloat"
        kind = bfloat if weight.dtype == BFLOAT16 else "float"
    shape = (weight.shape[0], weight.shape[1])
    way = "tiles" if tiles and kind == "pairs" else kind
    return PackedLinear(
        kernels,
        f"sage_multiply_{way}",
        kernels.pack(weight, kind, threads, free),
        shape,
        gated=f"sage_gated_{way}" if kernels.is_gated(*shape) else None,
        row=f"sage_row_{kind}",
        bias=bias,
    )
