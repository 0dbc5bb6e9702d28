"""Products with quantised weights in torch alone: blocks brought to float32 and thrown away."""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch.nn.functional import pad

from sagellm.backends.cpu.linear import Linear
from sagellm.backends.cpu.quantised.packing import BLOCK
from sagellm.backends.quantised import QuantisedWeight

_LARGEST = {8: 127, 16: 127 * 256 + 127}  # of 16 bits, what two bytes with sign hold
_BLOCK_NUMBERS = 1 << 21  # of a weight at a time: 8 MiB in float32, within the cache


def dequantising(
    weight: QuantisedWeight, bias: torch.Tensor | None, row_bits: int, *, alone: bool
) -> Linear:
    """rows [T, K] -> [T, N]. `alone`: one row a product, for the same bits in any batch.

    Rows are rounded where an 8-bit weight meets 8-bit rows, so that the mode means the same as in
    C; elsewhere they stay as they are.
    """
    order = None if weight.order is None else weight.order.long()

    def run(rows: torch.Tensor) -> torch.Tensor:
        given = rows if order is None else rows[:, order]
        if weight.bits == row_bits == 8:
            given = rounded(given)
        parts = torch.split(given, 1) if alone else (given,)
        blocks = [[F.linear(part.clone(), wide) for part in parts] for wide in _blocks(weight)]
        out = torch.cat([torch.cat(block) for block in blocks], 1)
        return out if bias is None else out.add_(bias)

    return run


def _blocks(weight: QuantisedWeight) -> Iterator[torch.Tensor]:
    """Rows of the weight in float32, in the order of its codes."""
    step = max(1, _BLOCK_NUMBERS // weight.shape[1])
    for top in range(0, weight.shape[0], step):
        yield weight.rows(top, top + step).ordered()


def rounded(rows: torch.Tensor, bits: int = 8) -> torch.Tensor:
    """Rows as the C kernels see them: whole numbers with a scale for each 32, in float32."""
    size, top = rows.shape[1], _LARGEST[bits]
    blocks = pad(rows, (0, -size % BLOCK)).view(len(rows), -1, BLOCK)
    most = blocks.abs().amax(-1, keepdim=True)
    codes = (blocks * torch.where(most > 1e-30, top / most, 0.0)).round()
    seen: torch.Tensor = (codes * (most / top)).flatten(1)[:, :size]
    return seen
