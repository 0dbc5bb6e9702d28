"""The C kernels as functions on arrays. Rows of an array may be strided, but the elements of a row
must be contiguous.
"""

import ctypes
import errno
import os
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np

from sagellm.backends.arrays import (
    BFLOAT16,
    Array,
    BlockIds,
    Floats,
    Integers,
    dtype_name,
    row_parts,
)
from sagellm.backends.cpu.native import c_structs
from sagellm.backends.cpu.native.compiler import compiled
from sagellm.backends.cpu.native.tuning import KernelTuning
from sagellm.backends.interface import Progress, silent
from sagellm.backends.quantised_weight import LEVELS
from sagellm.backends.step import SamplingParams, head_dim_of
from sagellm.backends.token_masks import Mask
from sagellm.graphs.log import get_logger

_log = get_logger(__name__)
_opened: list["NativeKernels | None"] = []  # empty, or the result of this process's first use
_opening = threading.Lock()

KV_DTYPES = ("float32", "bfloat16", "int8")  # of pools, in the order of codes.h

_POINTER, _LONG, _INT, _FLOAT = ctypes.c_void_p, ctypes.c_long, ctypes.c_int, ctypes.c_float
_MATRIX = (_POINTER, _LONG)  # first element, elements from row to row

PanelKind: TypeAlias = Literal["float", "bfloat", "pairs"]
KINDS: tuple[PanelKind, ...] = ("float", "bfloat", "pairs")  # in the order of panel.h

_SAMPLE_OPTIONS = np.dtype(  # of sample.c
    [("temperature", "f4"), ("min_p", "f4"), ("top_p", "f8"), ("number", "f8"), ("top_k", "i8")]
)

_SIGNATURES: dict[str, tuple[Any, ...]] = {
    "sage_linear": (_POINTER, *_MATRIX, *_MATRIX, _LONG, _INT),
    "sage_has_pairs": (),
    "sage_has_tiles": (),
    **dict.fromkeys(("sage_is_gated", "sage_is_quant_gated"), (_LONG, _LONG)),
    "sage_packed_bytes": (_LONG, _LONG, _INT),
    "sage_pack_all": (_POINTER, _LONG, _INT),
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
    "sage_sample": (*_MATRIX, _LONG, _LONG, _POINTER, _POINTER, _INT),
    "sage_quant_make": (
        *(_POINTER, _INT, _POINTER, _INT, _POINTER, _POINTER, _POINTER),
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
    """The C kernels, which return new arrays. Activations are float32; weights are float32 or
    bfloat16, pools also int8. `threads`: how many threads share the work, the caller's included.

    Every kernel without tiles is batch-invariant: a row's bits do not depend on other rows. Only
    tiles, and the names that end in `_many`, choose a kernel by the number of rows.
    """

    def __init__(self, path: Path) -> None:
        self._library = ctypes.CDLL(str(path))
        self.tuning = KernelTuning(self._library, path)
        for name, signature in _SIGNATURES.items():
            getattr(self._library, name).argtypes = signature
        for name in ("sage_packed_bytes", "sage_largest_allowed"):
            getattr(self._library, name).restype = _LONG
        self._library.sage_copy_sum.restype = ctypes.c_uint64

    def function(self, name: str) -> int:
        """The address of a C function, for a struct that points to it."""
        return ctypes.cast(getattr(self._library, name), _POINTER).value or 0

    @property
    def has_pairs(self) -> bool:
        """Whether this CPU multiplies pairs of bfloat16 (AVX512-BF16, or BF16 of ARM)."""
        return bool(self._library.sage_has_pairs())

    @property
    def has_tiles(self) -> bool:
        """Whether this CPU has AMX, and its operating system lets this process use it."""
        return bool(self._library.sage_has_tiles())

    def is_gated(self, num_cols: int, size: int, *, quantised: bool = False) -> bool:
        """Whether a gated kernel supports a weight [num_cols, size] of gate and up."""
        is_gated = self._library.sage_is_quant_gated if quantised else self._library.sage_is_gated
        return bool(is_gated(num_cols, size))

    def packed_bytes(self, num_cols: int, size: int, kind: PanelKind) -> int:
        """The bytes of a packed weight [num_cols, size]."""
        return int(self._library.sage_packed_bytes(num_cols, size, KINDS.index(kind)))

    def pack(self, packings: Sequence[c_structs.NativePacking], threads: int) -> None:
        """Pack weights in one call of C. Raises OSError for an unreadable file, and MemoryError."""
        array = (c_structs.NativePacking * len(packings))(*packings)
        error = self._library.sage_pack_all(array, len(array), threads)
        if error == errno.ENOMEM:
            raise MemoryError("no memory to pack weights")
        if error:
            raise OSError(error, os.strerror(error))

    def quantise(
        self,
        weight: Array,
        bits: int,
        tries: tuple[float, ...],
        threads: int,
        free: Callable[[], None] | None = None,
    ) -> tuple[Array, Array]:
        """Quantise a weight [N, K], float32 or bfloat16, in groups of 32. Returns codes [N, K] and
        scales [N, G] float16. `tries`: numbers to try for the largest number of a group. Codes of 4
        bits are those of LEVELS. `free`: as in `pack`.
        """
        num_rows, size = weight.shape
        codes: Array = np.empty((num_rows, size), dtype=np.uint8 if bits == 4 else np.int8)
        scales: Array = np.empty((num_rows, -(-size // 32)), dtype=np.float16)
        numbers = (_FLOAT * len(tries))(*tries), len(tries), (_FLOAT * len(LEVELS))(*LEVELS)
        for part in row_parts(weight, free):
            self._library.sage_quant_make(
                *(weight[part].ctypes.data, _is_bfloat(weight), *numbers),
                *(codes[part].ctypes.data, scales[part].ctypes.data, bits),
                *(len(weight[part]), size, threads),
            )
        return codes, scales

    def linear(self, linear: int, rows: Floats, num_cols: int, threads: int) -> Floats:
        """The product of rows [T, K] with the weight of the C `Linear` at the address `linear`:
        [T, num_cols].
        """
        out = np.empty((len(rows), num_cols), dtype=np.float32)
        self._library.sage_linear(linear, *_matrix(rows), *_matrix(out), len(rows), threads)
        return out

    def rms_norm(
        self, rows: Floats, weight: Floats, size: int, epsilon: float, threads: int
    ) -> Floats:
        """RMSNorm of every `size` consecutive numbers of each row of rows [T, N]."""
        return self._norm(rows, None, weight, size, epsilon, threads)[1]

    def add_rms_norm(
        self, a: Floats, b: Floats, weight: Floats, size: int, epsilon: float, threads: int
    ) -> tuple[Floats, Floats]:
        """Return the sum a + b, and the RMSNorm of the sum, as `rms_norm` computes it."""
        return self._norm(a, b, weight, size, epsilon, threads)

    def _norm(
        self, a: Floats, b: Floats | None, weight: Floats, size: int, eps: float, threads: int
    ) -> tuple[Floats, Floats]:
        out = np.empty(a.shape, dtype=np.float32)
        sums = a if b is None else np.empty(a.shape, dtype=np.float32)
        self._library.sage_rms_norm(
            *_matrix(a),
            *((None, 0) if b is None else _matrix(b)),
            *(weight.ctypes.data, sums.ctypes.data, out.ctypes.data),
            *(*a.shape, size, eps, threads),
        )
        return sums, out

    def silu_mul(self, gate: Floats, up: Floats, threads: int) -> Floats:
        """silu(gate) * up, for gate and up [T, N]."""
        out = np.empty(gate.shape, dtype=np.float32)
        self._library.sage_silu_mul(
            *_matrix(gate), *_matrix(up), out.ctypes.data, *gate.shape, threads
        )
        return out

    def rope_kv_write(
        self,
        q: Floats,
        k: Floats,
        v: Floats,
        *,
        tables: Floats,
        positions: Integers,
        slots: Integers,
        pool: Array,
        layer: int,
    ) -> Floats:
        """Return rotated q [T, heads * head_dim]; write rotated k and unchanged v to their slots.

        Shapes: tables [positions, 2, head_dim / 2], pool as in `KVLayout`.
        """
        out, head_dim = np.empty(q.shape, dtype=np.float32), head_dim_of(pool)
        kv_heads, block_size = pool.shape[3:5]
        places = (tables, positions, slots, out)
        self._library.sage_rope_kv_write(
            *(*_matrix(q), *_matrix(k), *_matrix(v)),
            *(place.ctypes.data for place in places),
            *_keys_and_values(pool, layer),
            *(len(q), q.shape[1] // head_dim, kv_heads, head_dim, block_size),
        )
        return out

    def attention(
        self,
        q: Floats,
        *,
        pool: Array,
        layer: int,
        block_tables: BlockIds,
        query_starts: Integers,
        context_lens: Integers,
        scale: float,
        window: int | None,
        threads: int,
        tiles: bool = False,
    ) -> Floats:
        """Attention of q [T, heads * head_dim] over the blocks of each row's sequence. `tiles`:
        whether tiles may multiply, so that bits depend on the number of rows.

        Raises MemoryError.
        """
        out, head_dim = np.empty(q.shape, dtype=np.float32), head_dim_of(pool)
        kv_heads, block_size = pool.shape[3:5]
        keys, values, dtype = _keys_and_values(pool, layer)
        heads = c_structs.NativeHeads(
            q.shape[1] // head_dim, kv_heads, head_dim, window or 0, scale
        )
        batch = c_structs.NativeBatch(
            *(block_tables.shape[1], len(context_lens), block_size),
            *(query_starts.ctypes.data, context_lens.ctypes.data, dtype, tiles),
        )
        first, ldq = _matrix(q)
        place = c_structs.NativeLayer(first, keys, values, out.ctypes.data, ldq, _matrix(out)[1])
        place.tables = block_tables.ctypes.data
        structures = (ctypes.byref(part) for part in (heads, batch, place))
        if self._library.sage_attention(*structures, threads):
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

    def largest_allowed(self, scores: Floats, mask: Mask) -> int | None:
        """The same result as `largest_allowed` of token_masks.py."""
        found: int = self._library.sage_largest_allowed(
            scores.ctypes.data, mask.ctypes.data, len(scores)
        )
        return None if found < 0 else found

    def sample_random(
        self,
        logits: Floats,
        samplings: Sequence[SamplingParams],
        numbers: Sequence[float],
        threads: int = 1,
    ) -> Integers:
        """The result of `sample_random` of sampler.py, but for rounding. Raises MemoryError."""
        given = zip(samplings, numbers, strict=True)
        options = np.array(
            [(one.temperature, one.min_p, one.top_p, number, one.top_k) for one, number in given],
            dtype=_SAMPLE_OPTIONS,
        )
        tokens = np.empty(len(logits), dtype=np.int64)
        if self._library.sage_sample(
            *(*_matrix(logits), *logits.shape, options.ctypes.data, tokens.ctypes.data, threads)
        ):
            raise MemoryError("no memory to sample")
        return tokens

    def run_step(self, step: c_structs.NativeStep, threads: int) -> None:
        """Run all instructions of a step.

        Raises IndexError for a token outside of the vocabulary, and MemoryError.
        """
        failed = self._library.sage_step_run(ctypes.byref(step), threads)
        if failed:
            raise _STEP_ERRORS[failed]

    def close_step(self, step: c_structs.NativeStep) -> None:
        """Free the memory that C keeps between steps."""
        self._library.sage_step_close(ctypes.byref(step))


_STEP_ERRORS = {  # by the error codes of step.h
    1: MemoryError("no memory for the sums of attention"),
    2: IndexError("a token id is outside of the vocabulary"),
}


def _matrix(rows: Floats) -> tuple[int, int]:
    return rows.ctypes.data, rows.strides[0] // rows.itemsize


def _keys_and_values(pool: Array, layer: int) -> tuple[int, int, int]:
    """The addresses of a layer's keys and values, and their dtype as a number of codes.h."""
    first = pool.ctypes.data + pool.strides[0] * layer
    return first, first + pool.strides[1], KV_DTYPES.index(dtype_name(pool.dtype))


def _is_bfloat(array: Array) -> int:
    return int(array.dtype == BFLOAT16)
