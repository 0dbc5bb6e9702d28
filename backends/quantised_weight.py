"""A quantised weight: integer codes with a scale for each group; and the modes that make one."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # graphs are checked without loading numpy
    import numpy as np
    import numpy.typing as npt

    from sagellm.backends.arrays import Array

ZERO_CODE = {4: 8, 8: 0}  # by bits: the code of 0.0 in a weight without `zeros`
GROUP_SIZE = 32  # codes along k that share a scale, in weights that are quantised on load


@dataclass(frozen=True, slots=True)
class QuantisationMode:
    """The bits of a weight, and of the activation rows that it is multiplied by.

    Rows of 16 bits keep the precision of float32 sums; rows of 8 bits lose as much precision as an
    int8 weight does.
    """

    weight_bits: int
    row_bits: int


MODES: Mapping[str, QuantisationMode] = {
    "int8": QuantisationMode(8, 16),
    "int4": QuantisationMode(4, 8),
    "w8a8": QuantisationMode(8, 8),
}
# The layer that computes the logits always uses this mode: no later layer evens out its error.
LOGITS_MODE = QuantisationMode(8, 16)


@dataclass(frozen=True, slots=True, eq=False)
class QuantisedWeight:
    """weight[n, k] = (codes[n, k] - zeros[n, g]) * scales[n, g], where g is k // group.

    Shapes: `codes` [N, K] (8 bits: int8; 4 bits: uint8 of 0 to 15), `scales` [N, G] float16,
    `zeros` [N, G] int16, or None if every zero is ZERO_CODE[bits]. `group`: the number of codes
    along k that share a scale, a multiple of 32; the last group may be shorter. `order` [K] int32:
    the k of each column of codes; None: ascending.
    """

    bits: int
    group: int
    codes: "Array"
    scales: "Array"
    zeros: "Array | None" = None
    order: "Array | None" = None

    @property
    def shape(self) -> tuple[int, int]:
        return self.codes.shape[0], self.codes.shape[1]

    def rows(self, top: int, end: int) -> "QuantisedWeight":
        """The rows from `top` to `end`, as a view."""
        zeros = None if self.zeros is None else self.zeros[top:end]
        part = self.codes[top:end], self.scales[top:end]
        return QuantisedWeight(self.bits, self.group, *part, zeros, self.order)

    def dequantised(self) -> "npt.NDArray[np.float32]":
        """The weight in float32 [N, K], its columns in ascending order of k."""
        values = self.ordered()
        return values if self.order is None else values[:, self.order.argsort()]

    def ordered(self) -> "npt.NDArray[np.float32]":
        """The weight in float32 [N, K], its columns in the order of the codes."""
        values: npt.NDArray[np.float32] = self.codes.astype("float32")
        values -= ZERO_CODE[self.bits] if self.zeros is None else self._each(self.zeros)
        values *= self._each(self.scales)
        return values

    def _each(self, of_groups: "Array") -> "npt.NDArray[np.float32]":
        """Repeat a value of each group for its columns: [N, G] -> float32 [N, K]."""
        return of_groups.astype("float32").repeat(self.group, 1)[:, : self.shape[1]]
