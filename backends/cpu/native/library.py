"""The C kernels as functions on tensors. Rows of a tensor may be strided, but the elements of a row
must be contiguous.
"""

import ctypes
import mmap
import threading
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt
import torch

from sagellm.backends.cpu.native.c_structs import NativeBatch, NativeHeads, NativeLayer, NativeStep
from sagellm.backends.cpu.native.compiler import compiled
from sagellm.backends.interface import Progress, silent
from sagellm.backends.token_masks import Mask
from sagellm.graphs.log import get_logger

_log = get_logger(__name__)
LARGE_PAGE = 2 << 20  # bytes
_opened: list["NativeKernels | None"] = []  # empty, or the result of this process's first use
_opening = threading.Lock()

_POINTER, _LONG, _INT, _FLOAT = ctypes.c_void_p, ctypes.c_long, ctypes.c_int, ctypes.c_float
_MATRIX = (_POINTER, _LONG)  # first element, elements from row to row

PanelKind: TypeAlias = Literal["float", "bfloat", "pairs"]
_KINDS: tuple[PanelKind, ...] = ("float", "bfloat", "pairs")  # in the order of panel.h

_SIGNATURES: dict[str, tuple[Any, ...]] = {
    "sage_linear": (_POINTER, *_MATRIX, *_MATRIX, _LONG, _INT),
    "sage_has_pairs": (),
    "sage_has_tiles": (),
    "sage_is_gated": (_LONG, _LONG),
    "sage_packed_bytes": (_LONG, _LONG, _INT),
    "sage_pack": (_POINTER, _INT, _POINTER, _LONG, _LONG, _INT),
    "sage_rms_norm": (
        *(*_MATRIX, *_MATRIX, _POINTER, _POINTER, _POINTER),
        *(_LONG, _LONG, _LONG, _FLOAT, _INT),
    ),
    "sage_silu_mul": (*_MATRIX, *_MATRIX, _POINTER, _LONG, _LONG, _INT),
    "sage_rope_kv_write": (
        *(*_MATRIX, *_MATRIX, *_MATRIX, _POINTER, _POINTER, _POINTER),
        *(_POINTER, _POINTER, _POINTER, _INT, _LONG, _LONG, _LONG, _LONG, _LONG),
    ),
    "sage_attention": (_POINTER, _POINTER, _POINTER, _INT),
    "sage_step_run": (_POINTER, _INT),
    "sage_step_close": (_POINTER,),
    "sage_copy_sum": (_LONG, _POINTER, _POINTER, _POINTER),
    "sage_largest_allowed": (_POINTER, _POINTER, _LONG),
    "sage_quant_make": (
        *(_POINTER, _INT, _POINTER, _INT, _POINTER, _POINTER),
        *(_INT, _LONG, _LONG, _INT),
    ),
}


def native_kernels(progress: Progress = silent) -> "NativeKernels | None":
    """The kernels of this process, built on first use; None without a working C compiler.

    `progress` is called before a build.
    """
    with _opening:
        if not _opened:
            _opened.append(open_kernels(progress))
        return _opened[0]


def open_kernels(
    progress: Progress = silent, flags: tuple[str, ...] = ()
) -> "NativeKernels | None":
    """Open the library, and build it first if needed. Returns None if that fails. `flags`: more
    flags of the compiler.

    A library that does not load, for example because a full disk truncated it, is built once more.
    """
    for _ in range(2):
        path = compiled(progress, flags)
        if path is None:
            return None
        try:
            return NativeKernels(path)
        except OSError as error:
            _log.warning("native_kernels_broken", cause=str(error), fix="see the compiler's output")
            with suppress(OSError):
                path.unlink()
    return None


class NativeKernels:
    """The C kernels, which return new tensors. Activations are float32; weights and pools are
    float32 or bfloat16.

    Every kernel without tiles is batch-invariant: a row's bits do not depend on other rows.
    """

    def __init__(self, path: Path) -> None:
        self._library = ctypes.CDLL(str(path))
        for name, signature in _SIGNATURES.items():
            getattr(self._library, name).argtypes = signature
        self._library.sage_packed_bytes.restype = _LONG
        self._library.sage_copy_sum.restype = ctypes.c_uint64
        self._library.sage_largest_allowed.restype = _LONG

    def function(self, name: str) -> int:
        """The address of a C function, for a struct that points to it."""
        return ctypes.cast(getattr(self._library, name), _POINTER).value or 0

    @property
    def has_pairs(self) -> bool:
        """Whether this CPU multiplies pairs of bfloat16 (AVX512-BF16)."""
        return bool(self._library.sage_has_pairs())

    @property
    def has_tiles(self) -> bool:
        """Whether this CPU has AMX, and its operating system lets this process use it."""
        return bool(self._library.sage_has_tiles())

    def is_gated(self, num_cols: int, size: int) -> bool:
        """Whether a gated kernel supports a weight [num_cols, size] of gate and up."""
        return bool(self._library.sage_is_gated(num_cols, size))

    def pack(self, weight: torch.Tensor, kind: PanelKind) -> torch.Tensor:
        """Copy a contiguous weight [N, K] to the order `kind` of panel.h: a vector of its dtype."""
        number = _KINDS.index(kind)
        num_bytes = self._library.sage_packed_bytes(*weight.shape, number)
        packed = empty_in_large_pages(num_bytes // weight.element_size(), weight.dtype)
        self._library.sage_pack(
            *(weight.data_ptr(), number, packed.data_ptr()),
            *(*weight.shape, torch.get_num_threads()),
        )
        return packed

    def quantise(
        self, weight: torch.Tensor, bits: int, tries: tuple[float, ...]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Quantise a weight [N, K], float32 or bfloat16, in groups of 32. Returns codes [N, K] and
        scales [N, G] float16. `tries`: codes to try for the largest number of a group.
        """
        num_rows, size = weight.shape
        codes = torch.empty(num_rows, size, dtype=torch.uint8 if bits == 4 else torch.int8)
        scales = torch.empty(num_rows, -(-size // 32), dtype=torch.float16)
        self._library.sage_quant_make(
            *(weight.data_ptr(), _is_bfloat(weight)),
            *((_FLOAT * len(tries))(*tries), len(tries)),
            *(codes.data_ptr(), scales.data_ptr(), bits, num_rows, size),
            torch.get_num_threads(),
        )
        return codes, scales

    def linear(self, linear: int, rows: torch.Tensor, num_cols: int) -> torch.Tensor:
        """The product of rows [T, K] with the weight of the C `Linear` at the address `linear`:
        [T, num_cols].
        """
        out = torch.empty(len(rows), num_cols)
        threads = torch.get_num_threads()
        self._library.sage_linear(linear, *_matrix(rows), *_matrix(out), len(rows), threads)
        return out

    def rms_norm(
        self, rows: torch.Tensor, weight: torch.Tensor, size: int, epsilon: float
    ) -> torch.Tensor:
        """RMSNorm of every `size` consecutive numbers of each row of rows [T, N]."""
        return self._norm(rows, None, weight, size, epsilon)[1]

    def add_rms_norm(
        self, a: torch.Tensor, b: torch.Tensor, weight: torch.Tensor, size: int, epsilon: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the sum a + b, and the RMSNorm of the sum, as `rms_norm` computes it."""
        return self._norm(a, b, weight, size, epsilon)

    def _norm(
        self, a: torch.Tensor, b: torch.Tensor | None, weight: torch.Tensor, size: int, eps: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        out = torch.empty(a.shape)
        sums = a if b is None else torch.empty(a.shape)
        self._library.sage_rms_norm(
            *_matrix(a),
            *((None, 0) if b is None else _matrix(b)),
            *(weight.data_ptr(), sums.data_ptr(), out.data_ptr()),
            *(*a.shape, size, eps, torch.get_num_threads()),
        )
        return sums, out

    def silu_mul(self, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        """silu(gate) * up, for gate and up [T, N]."""
        out = torch.empty(gate.shape)
        self._library.sage_silu_mul(
            *_matrix(gate), *_matrix(up), out.data_ptr(), *gate.shape, torch.get_num_threads()
        )
        return out

    def rope_kv_write(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        *,
        tables: torch.Tensor,
        positions: torch.Tensor,
        slots: torch.Tensor,
        pool: torch.Tensor,
        layer: int,
    ) -> torch.Tensor:
        """Return rotated q [T, heads * head_dim]; write rotated k and unchanged v to their slots.

        Shapes: tables [positions, 2, head_dim / 2], pool [layers, 2, blocks, kv_heads, block_size,
        head_dim].
        """
        out = torch.empty(q.shape)
        _, _, _, kv_heads, block_size, head_dim = pool.shape
        self._library.sage_rope_kv_write(
            *(*_matrix(q), *_matrix(k), *_matrix(v)),
            *(tables.data_ptr(), positions.data_ptr(), slots.data_ptr(), out.data_ptr()),
            *_keys_and_values(pool, layer),
            *(len(q), q.shape[1] // head_dim, kv_heads, head_dim, block_size),
        )
        return out

    def attention(
        self,
        q: torch.Tensor,
        *,
        pool: torch.Tensor,
        layer: int,
        block_tables: torch.Tensor,
        query_starts: torch.Tensor,
        context_lens: torch.Tensor,
        scale: float,
        window: int | None,
        tiles: bool = False,
    ) -> torch.Tensor:
        """Attention of q [T, heads * head_dim] over the blocks of each row's sequence. `tiles`:
        whether tiles may multiply, so that bits depend on the number of rows.

        Raises MemoryError.
        """
        out = torch.empty(q.shape)
        _, _, _, kv_heads, block_size, head_dim = pool.shape
        keys, values, bfloat = _keys_and_values(pool, layer)
        heads = NativeHeads(q.shape[1] // head_dim, kv_heads, head_dim, window or 0, scale)
        batch = NativeBatch(
            *(block_tables.shape[1], len(context_lens), block_size),
            *(query_starts.data_ptr(), context_lens.data_ptr(), bfloat, tiles),
        )
        place = NativeLayer(q.data_ptr(), keys, values, out.data_ptr(), q.stride(0), out.stride(0))
        place.tables = block_tables.data_ptr()
        structures = (ctypes.byref(part) for part in (heads, batch, place))
        if self._library.sage_attention(*structures, torch.get_num_threads()):
            raise MemoryError("no memory for the sums of attention")
        return out

    def copy_sum(self, runs: Sequence[tuple[int, int, int]]) -> int:
        """Copy runs (source address, target address, bytes); return the xxh3_64 of the bytes.

        Each size must be a multiple of 64, and their sum above 240. The caller ensures that all
        addresses are valid.
        """
        count, (sources, targets, sizes) = len(runs), zip(*runs, strict=True)
        pointers = _POINTER * count
        sum_: int = self._library.sage_copy_sum(
            count, pointers(*sources), pointers(*targets), (_LONG * count)(*sizes)
        )
        return sum_

    def largest_allowed(self, scores: npt.NDArray[np.float32], mask: Mask) -> int | None:
        """The same result as `largest_allowed` of token_masks.py."""
        found: int = self._library.sage_largest_allowed(
            scores.ctypes.data, mask.ctypes.data, len(scores)
        )
        return None if found < 0 else found

    def run_step(self, step: NativeStep) -> None:
        """Run all instructions of a step.

        Raises IndexError for a token outside of the vocabulary, and MemoryError.
        """
        failed = self._library.sage_step_run(ctypes.byref(step), torch.get_num_threads())
        if failed:
            raise _STEP_ERRORS[failed]

    def close_step(self, step: NativeStep) -> None:
        """Free the memory that C keeps between steps."""
        self._library.sage_step_close(ctypes.byref(step))


_STEP_ERRORS = {  # by the error codes of step.h
    1: MemoryError("no memory for the sums of attention"),
    2: IndexError("a token id is outside of the vocabulary"),
}


def _matrix(rows: torch.Tensor) -> tuple[int, int]:
    return rows.data_ptr(), rows.stride(0)


def _keys_and_values(pool: torch.Tensor, layer: int) -> tuple[int, int, int]:
    """The addresses of a layer's keys and values, and whether they are bfloat16.

    Computed from strides, because slices of tensors cost more time.
    """
    side, size = pool.stride(1), pool.element_size()
    first = pool.data_ptr() + pool.stride(0) * layer * size
    return first, first + side * size, _is_bfloat(pool)


def _is_bfloat(tensor: torch.Tensor) -> int:
    return int(tensor.dtype == torch.bfloat16)


def empty_in_large_pages(num_elements: int, dtype: torch.dtype) -> torch.Tensor:
    """Allocate an uninitialised vector in large pages, from which sequential reads are faster.

    The end of the vector, which would not fill a large page, is in small pages to save memory. On a
    system without large pages, the whole vector is in small pages.
    """
    num_bytes = num_elements * dtype.itemsize
    advice = getattr(mmap, "MADV_HUGEPAGE", None)  # Linux
    if num_bytes < LARGE_PAGE or advice is None:
        return torch.empty(num_elements, dtype=dtype)
    memory = mmap.mmap(-1, num_bytes + LARGE_PAGE)
    start = -_address_of(memory) % LARGE_PAGE
    try:
        memory.madvise(advice, start, num_bytes // LARGE_PAGE * LARGE_PAGE)
    except OSError:  # a Linux without large pages
        return torch.empty(num_elements, dtype=dtype)
    return torch.frombuffer(memory, dtype=torch.uint8, count=num_bytes, offset=start).view(dtype)


def in_large_pages(tensor: torch.Tensor) -> torch.Tensor:
    """A copy of a contiguous tensor in large pages, or the tensor itself if it is too small."""
    if tensor.nbytes < LARGE_PAGE:
        return tensor
    return empty_in_large_pages(tensor.numel(), tensor.dtype).view(tensor.shape).copy_(tensor)


def _address_of(memory: mmap.mmap) -> int:
    return torch.frombuffer(memory, dtype=torch.uint8).data_ptr()
