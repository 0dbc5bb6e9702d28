"""Linear layers with float weights, packed for the C kernels."""

import ctypes
from collections.abc import Sequence
from typing import Protocol, TypeAlias, runtime_checkable

import numpy as np

from sagellm.backends.arrays import BFLOAT16, Array, Floats, LargePages
from sagellm.backends.cpu.native.c_structs import NativeLinear, NativePacking
from sagellm.backends.cpu.native.library import KINDS, NativeKernels, PanelKind
from sagellm.backends.interface import LoweringError

# A file's descriptor, and the offset of an array in the file.
FilePlace: TypeAlias = tuple[int, int]

_PANELS = 64  # columns: whole panels on every CPU
_MOST_STORED = 1 << 30  # of weights in files that wait: their pages take no memory meanwhile
_MOST_COPIED = 32 << 20  # of other weights that wait


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


@runtime_checkable
class WeightsInFiles(Protocol):
    """Weights that are views of mapped files."""

    def file_place(self, array: Array) -> FilePlace | None:
        """The place of a contiguous array, to be read instead of its pages; None for any other."""

    def count_read(self, num_bytes: int) -> None:
        """Report the progress of reading: so many more bytes have been read from files."""

    def give_back(self) -> None:
        """Drop the pages of the files from memory; those that are used again are read again."""


class PackingQueue:
    """Weights that wait to be packed.

    C packs them together without Python's lock, so that another thread reads the tokenizer
    meanwhile. `files`: the files that may hold them.
    """

    def __init__(
        self,
        kernels: NativeKernels,
        threads: int,
        files: WeightsInFiles | None = None,
    ) -> None:
        self._kernels = kernels
        self._threads = threads
        self._files = files
        # In vectors of their own, the ends of weights would be in small pages: a tenth of a model.
        self._memory = LargePages()
        # With the arrays that C reads and writes.
        self._waiting: list[tuple[NativePacking, Array, Array]] = []
        self._num_stored = self._num_copied = 0  # bytes in files and in memory

    def add(self, parts: Sequence[Array], kind: PanelKind) -> Array:
        """The copy of contiguous parts [N, K] of a weight in the order `kind` of panel.h: a vector
        of their dtype, complete after `run`. Raises as `run`, which it calls when too many weights
        wait.
        """
        if any(len(part) % _PANELS for part in parts[:-1]):
            parts = [np.concatenate(parts)]
        num_cols, (size, dtype) = sum(map(len, parts)), (parts[0].shape[1], parts[0].dtype)
        num_bytes = self._kernels.packed_bytes(num_cols, size, kind)
        packed = self._memory.empty(num_bytes // dtype.itemsize, dtype)
        begin = 0
        for part in parts:
            self._put(part, kind, packed, begin)
            begin += self._kernels.packed_bytes(len(part), size, kind)
        if self._num_stored >= _MOST_STORED or self._num_copied >= _MOST_COPIED:
            self.run()
        return packed

    def _put(self, weight: Array, kind: PanelKind, packed: Array, begin: int) -> None:
        """Have a weight packed to the bytes of `packed` from `begin` on."""
        place = self._files.file_place(weight) if self._files else None
        fd, offset = place or (-1, 0)
        sizes = (*weight.shape, offset, KINDS.index(kind), fd)
        packing = NativePacking(weight.ctypes.data, packed.ctypes.data + begin, *sizes)
        self._waiting.append((packing, weight, packed))
        if place:
            self._num_stored += weight.nbytes
        else:
            self._num_copied += weight.nbytes

    def run(self) -> None:
        """Pack all weights that wait. Raises LoweringError and MemoryError."""
        self._count_read(0)
        try:
            self._kernels.pack([packing for packing, *_ in self._waiting], self._threads)
        except OSError as error:
            raise LoweringError(f"the weights cannot be read: {error.strerror}") from error
        self._count_read(self._num_stored)
        self._waiting.clear()
        self._num_stored = self._num_copied = 0

    def _count_read(self, num_bytes: int) -> None:
        if self._files:
            self._files.count_read(num_bytes)


def pack(
    kernels: NativeKernels,
    weight: Array,
    bias: Floats | None,
    kind: PanelKind | None = None,
    threads: int = 1,
    *,
    others: Sequence[Array] = (),
    tiles: bool = False,
    queue: PackingQueue | None = None,
) -> PackedLinear:
    """The product with a packed copy of `weight` [N, K], float32 or bfloat16, and of the weights
    `others`, which are concatenated to it along N.

    `kind` None: the fastest kind on this CPU for the dtype. "pairs" rounds the rows to bfloat16.
    `tiles`: whether tiles multiply these pairs where there are enough rows. `queue`: the copy is
    complete after its `run`; None: at once.
    """
    if kind is None:
        bfloat: PanelKind = "pairs" if kernels.has_pairs else "bfloat"
        kind = bfloat if weight.dtype == BFLOAT16 else "float"
    parts = [weight, *others]
    shape = (sum(map(len, parts)), weight.shape[1])
    waiting = queue or PackingQueue(kernels, threads)
    packed = waiting.add(parts, kind)
    if queue is None:
        waiting.run()
    way = "tiles" if tiles and kind == "pairs" else kind
    return PackedLinear(
        kernels,
        f"sage_multiply_{way}",
        packed,
        shape,
        gated=f"sage_gated_{way}" if kernels.is_gated(*shape) else None,
        row=f"sage_row_{kind}",
        bias=bias,
    )
