"""Weights as C kernels want them: made once at load, then called with rows."""

import ctypes

import torch

from sagellm.backends.cpu.native.library import NativeKernels, PanelKind
from sagellm.backends.cpu.native.structs import Linear


class PackedLinear:
    """rows [T, K] float32 -> [T, N] float32; rows may be strided, their elements may not.

    `kernel` names a `multiply` of the library, and `gated` its gated form; `weight`, `scales` and
    `zeros` are in its order, and live as long as this does, as `bias` [N] float32 does. `address`
    is where its C `Linear` is, for callers in C: good as long as this lives.
    """

    def __init__(
        self,
        kernels: NativeKernels,
        kernel: str,
        weight: torch.Tensor,
        shape: tuple[int, int],
        *,
        gated: str | None = None,
        bias: torch.Tensor | None = None,
        scales: torch.Tensor | None = None,
        zeros: torch.Tensor | None = None,
        group: int = 0,
    ) -> None:
        self.shape = shape  # N, K
        self._kernels = kernels
        self._kept = (weight, scales, zeros, bias)
        pointers = [None if part is None else part.data_ptr() for part in self._kept]
        run = kernels.function(kernel), kernels.function(gated) if gated else None
        self._struct = Linear(*run, *pointers, *shape, group)
        self.address = ctypes.addressof(self._struct)

    def __call__(self, rows: torch.Tensor) -> torch.Tensor:
        return self._kernels.linear(self.address, rows, self.shape[0])


def pack(
    kernels: NativeKernels,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    kind: PanelKind | None = None,
) -> PackedLinear:
    """A copy of weight [N, K], float32 or bfloat16; the same bits for any number of rows.

    `kind` None: what is fastest here for that dtype. "pairs" rounds the rows to bfloat16.
    """
    if kind is None:
        bfloat: PanelKind = "pairs" if kernels.has_pairs else "bfloat"
        kind = bfloat if weight.dtype == torch.bfloat16 else "float"
    shape = (weight.shape[0], weight.shape[1])
    return PackedLinear(
        kernels,
        f"sage_multiply_{kind}",
        kernels.pack(weight, kind),
        shape,
        gated=f"sage_gated_{kind}" if kernels.is_gated(*shape) else None,
        bias=bias,
    )
