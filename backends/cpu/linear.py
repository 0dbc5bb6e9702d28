"""Linear layers with float weights: ways to multiply, chosen by CPU, dtype and determinism."""

import ctypes
from collections.abc import Callable
from typing import TypeAlias

import torch
import torch.nn.functional as F

from sagellm.backends.cpu.binding import Binding
from sagellm.backends.cpu.native.c_structs import NativeLinear
from sagellm.backends.cpu.native.library import NativeKernels, PanelKind

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


def packed(weight: torch.Tensor, bias: torch.Tensor | None) -> LinearFunction:
    """The product by oneDNN with a weight that oneDNN packed: three times faster for few rows."""
    dtype = weight.dtype
    order = torch.ops.mkldnn._reorder_linear_weight(weight, 8)  # 8: the expected number of rows
    offset = None if bias is None else bias.to(dtype)

    def run(rows: torch.Tensor) -> torch.Tensor:
        product = torch.ops.mkldnn._linear_pointwise(
            rows.to(dtype).contiguous(), order, offset, "none", [], ""
        )
        return torch.Tensor.float(product)

    return run


def native(
    kernels: NativeKernels, weight: torch.Tensor, bias: torch.Tensor | None, *, tiles: bool = False
) -> LinearFunction:
    """The product by the C kernel: without tiles, the same bits for any number of rows."""
    return pack(kernels, weight, bias, tiles=tiles)


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


class PackedLinear:
    """Multiplies rows [T, K] by a packed weight in a C kernel. The result is [T, N].

    Rows may be strided, but the elements of a row are contiguous. `kernel` names a `multiply`
    function of the library, and `gated` its gated form; `weight` has the kernel's order. `address`:
    the address of the C `NativeLinear`, valid while this object lives.
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
    ) -> None:
        self.shape = shape  # N, K
        self._kernels = kernels
        self._kept = (weight, bias)  # the struct points into their memory
        run = kernels.function(kernel), kernels.function(gated) if gated else None
        self._struct = NativeLinear(*run, weight.data_ptr())
        self._struct.bias = None if bias is None else bias.data_ptr()
        self._struct.num_cols, self._struct.k = shape
        self.address = ctypes.addressof(self._struct)

    def __call__(self, rows: torch.Tensor) -> torch.Tensor:
        return self._kernels.linear(self.address, rows, self.shape[0])


def pack(
    kernels: NativeKernels,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    kind: PanelKind | None = None,
    *,
    tiles: bool = False,
) -> PackedLinear:
    """The product with a packed copy of `weight` [N, K], float32 or bfloat16.

    `kind` None: the fastest kind on this CPU for the dtype. "pairs" rounds the rows to bfloat16.
    `tiles`: whether tiles multiply these pairs where there are enough rows.
    """
    if kind is None:
        bfloat: PanelKind = "pairs" if kernels.has_pairs else "bfloat"
        kind = bfloat if weight.dtype == torch.bfloat16 else "float"
    shape = (weight.shape[0], weight.shape[1])
    way = "tiles" if tiles and kind == "pairs" else kind
    return PackedLinear(
        kernels,
        f"sage_multiply_{way}",
        kernels.pack(weight, kind),
        shape,
        gated=f"sage_gated_{way}" if kernels.is_gated(*shape) else None,
        bias=bias,
    )
