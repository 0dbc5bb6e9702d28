"""A model's weights in safetensors files, plain or quantised.

Quantised formats: GPTQ (arXiv:2210.17323) as AutoGPTQ and GPTQModel write it, AWQ
(arXiv:2306.00978) as AutoAWQ writes it in the version GEMM. Codes are never converted to floats.
"""

import math
import mmap
import os
import sys
import weakref
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from sagellm.backends.arrays import BFLOAT16, Array, dtype_name, opaque, to_float32
from sagellm.backends.interface import Loading, Progress, silent
from sagellm.backends.quantised_weight import ZERO_CODE, QuantisedWeight
from sagellm.graphs.ir import Graph
from sagellm.graphs.models.config import StoredQuantisation, stored_quantisation
from sagellm.graphs.vocabulary import nearest
from sagellm.runtime.models.files import StoredTensor, read_header
from sagellm.runtime.models.folder import ModelError, ModelFolder, shard_files


def drop_pages(maps: Iterable[mmap.mmap]) -> None:
    """Drop the resident pages of mapped files from this process. Only Linux can do this; elsewhere
    the function does nothing.

    The memory stays valid: the system reads the pages again when they are used. Writes to a private
    mapping are lost.
    """
    if sys.platform == "linux":
        for mapped in maps:
            mapped.madvise(mmap.MADV_DONTNEED)


_HELD_BYTES = 8 << 20  # mapped pages are dropped each time this number of bytes has been read
_DTYPES: Mapping[str, np.dtype[Any]] = {  # by the names of the format
    "BF16": BFLOAT16,
    "F8_E4M3": opaque("float8_e4m3fn", 1),
    "F8_E5M2": opaque("float8_e5m2", 1),
    "BOOL": np.dtype(np.bool_),
    **{
        f"{letter}{8 * size}": np.dtype(f"<{kind}{size}")
        for letter, kind, sizes in (("F", "f", (2, 4, 8)), ("I", "i", (1, 2, 4, 8)))
        for size in sizes
    },
    **{f"U{8 * size}": np.dtype(f"<u{size}") for size in (1, 2, 4, 8)},
}


class SafetensorsWeights(Mapping[str, Array]):
    """Maps names to arrays. Headers are read at once; an array is a view of the mapped file.

    Pages that were read are dropped at intervals, so that the memory does not hold the weights
    twice while a backend copies them. The arrays stay valid, but must not be written to.

    `progress` is called with the number of bytes that have been read. Raises ModelError if a file
    is damaged, or lacks a tensor that the index promises.
    """

    def __init__(self, folder: ModelFolder, progress: Progress = silent) -> None:
        if folder.path is None:
            raise ModelError(f"model {folder.name} has no weights")
        self._folder = folder.name
        self._tensors: dict[str, StoredTensor] = {}
        self._maps: dict[str, mmap.mmap] = {}
        self._files: list[tuple[int, int, int]] = []  # address, bytes and descriptor of each map
        self._unreturned_bytes = 0
        self._progress = progress
        self._read_bytes = self._told_bytes = 0
        self._is_counted = False  # the caller reads files itself, and calls `count_read`
        for file, promised in shard_files(folder.name, folder.path).items():
            held = self._open(folder.path / file, file)
            missing = sorted(set(promised) - set(held))
            if missing:
                raise ModelError(f"model {folder.name}: {file} lacks tensor {missing[0]}")
            self._tensors.update(held)
        self._total_bytes = sum(map(len, self._maps.values()))

    def __getitem__(self, name: str) -> Array:
        tensor = self._tensors[name]
        dtype = _DTYPES.get(tensor.dtype)
        if dtype is None:
            cause = f"tensor {name} is stored as {tensor.dtype}, which is not read"
            raise ModelError(f"model {self._folder}: {cause}")
        if self._unreturned_bytes >= _HELD_BYTES:
            self.give_back()
        if not self._is_counted and self._read_bytes - self._told_bytes >= _HELD_BYTES:
            self._tell()
        self._unreturned_bytes += tensor.num_bytes
        self._read_bytes += tensor.num_bytes
        count = math.prod(tensor.shape)
        flat = np.frombuffer(self._maps[tensor.file], dtype, count, tensor.begin)
        return flat.reshape(tensor.shape)

    def __contains__(self, name: object) -> bool:
        return name in self._tensors  # without reading it

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def file_place(self, array: Array) -> tuple[int, int] | None:
        """The descriptor of a file, valid as long as this object, and the offset of a contiguous
        array in it. The caller reads the file, and leaves the pages of the array alone. None: the
        array is no view of a file. From the first call on, only `count_read` reports progress.
        """
        self._is_counted = True
        begin = array.ctypes.data
        for address, num_bytes, descriptor in self._files:
            if address <= begin and begin + array.nbytes <= address + num_bytes:
                self._unreturned_bytes -= array.nbytes
                self._read_bytes -= array.nbytes
                return descriptor, begin - address
        return None

    def give_back(self) -> None:
        """Drop the resident pages of all tensors. A page that is used again is read again."""
        drop_pages(self._maps.values())
        self._unreturned_bytes = 0

    def loaded(self) -> None:
        """Report full progress. Tensors that were not read are not needed, or are read later."""
        self._progress(Loading(self._folder, self._total_bytes, self._total_bytes))

    def count_read(self, num_bytes: int) -> None:
        """Report the progress: so many more bytes have been read from the files."""
        self._read_bytes += num_bytes
        self._tell()

    def _tell(self) -> None:
        """Report the progress. It stays below the total, even if tensors are read twice."""
        self._told_bytes = self._read_bytes
        num_bytes = min(max(self._read_bytes, 0), self._total_bytes - 1)
        self._progress(Loading(self._folder, num_bytes, self._total_bytes))

    def require(self, names: Iterable[str]) -> None:
        """Raise ModelError for the first name that no file holds."""
        for name in names:
            if name not in self._tensors:
                close = nearest(name, list(self._tensors))
                hint = f"; the nearest there is {close}" if close else ""
                raise ModelError(f"model {self._folder}: tensor {name} is missing{hint}")

    def _open(self, path: Path, file: str) -> dict[str, StoredTensor]:
        """Map a file, and return its tensors by name."""
        try:
            safe_open(str(path), framework="np")  # checks the header, and the sizes in it
            with path.open("rb") as opened:
                # Copy on write: libraries that take an array ask whether they may write to it.
                mapped = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_COPY)
                self._maps[file], descriptor = mapped, os.dup(opened.fileno())
                weakref.finalize(self, os.close, descriptor)
            address = np.frombuffer(mapped, np.uint8).ctypes.data
            self._files.append((address, len(mapped), descriptor))
        except (SafetensorError, OSError) as error:
            raise ModelError(f"model {self._folder}: {file} cannot be read: {error}") from error
        return read_header(self._folder, path)


def weight_names(graph: Graph) -> tuple[str, ...]:
    """The tensors that a kernel graph reads, in the order of its nodes."""
    named = (node.attrs.get(key) for node in graph.nodes for key in ("weight", "bias"))
    return tuple(dict.fromkeys(name for name in named if isinstance(name, str) and name))


_WORD_BITS = 32
_AWQ_PLACES = (0, 4, 1, 5, 2, 6, 3, 7)  # the place in a word of columns 0, 1, 2, ...
_BLOCK = 32


class PackedWeights(Mapping[str, Array | QuantisedWeight]):
    """Maps names to weights. If the folder stores `NAME.qweight`, `NAME.qzeros` and `NAME.scales`,
    an access to `NAME.weight` unpacks a quantised weight from these three tensors.

    The access raises ModelError if the tensors do not fit together.
    """

    def __init__(
        self, folder: ModelFolder, stored: StoredQuantisation, progress: Progress = silent
    ) -> None:
        self._weights = SafetensorsWeights(folder, progress)
        self.file_place, self.count_read = self._weights.file_place, self._weights.count_read
        self._folder = folder.name
        self._stored = stored

    def __getitem__(self, name: str) -> Array | QuantisedWeight:
        stem = name.removesuffix(".weight")
        if name in self._weights or f"{stem}.qweight" not in self._weights:
            return self._weights[name]
        try:
            return self._unpacked(stem)
        except ValueError as error:
            raise ModelError(f"model {self._folder}: {stem}: {error}") from error

    def __iter__(self) -> Iterator[str]:
        return (
            f"{name.removesuffix('qweight')}weight" if name.endswith(".qweight") else name
            for name in self._weights
        )

    def __len__(self) -> int:
        return len(self._weights)

    def give_back(self) -> None:
        """Drop the resident pages of all tensors. A page that is used again is read again."""
        self._weights.give_back()

    def loaded(self) -> None:
        """Report full progress."""
        self._weights.loaded()

    def require(self, names: Iterable[str]) -> None:
        """Raise ModelError for the first name that no file holds, plain or quantised."""
        held = set(self)
        self._weights.require(name for name in names if name not in held)

    def _unpacked(self, stem: str) -> QuantisedWeight:
        parts = {}
        for part in ("qweight", "qzeros", "scales"):
            self._weights.require([f"{stem}.{part}"])
            parts[part] = self._weights[f"{stem}.{part}"]
        if self._stored.method == "awq":
            return awq(self._stored, parts)
        return gptq(self._stored, {**parts, "g_idx": self._weights.get(f"{stem}.g_idx")})


def open_weights(
    folder: ModelFolder, progress: Progress = silent
) -> SafetensorsWeights | PackedWeights:
    """The weights of a folder, plain or quantised. Raises ModelError, UnsupportedModel."""
    stored = stored_quantisation(folder.config)
    if stored is None:
        return SafetensorsWeights(folder, progress)
    return PackedWeights(folder, stored, progress)


def gptq(stored: StoredQuantisation, parts: Mapping[str, Array | None]) -> QuantisedWeight:
    """Unpack a GPTQ weight: qweight [K / codes per word, N], qzeros [G, N / codes per word],
    scales [G, N], g_idx [K].

    If g_idx is not sorted, the columns are, and the weight gets their `order`. Raises ValueError.
    """
    codes = _spread(_whole(parts, "qweight").T, stored.bits)  # [N, K]
    zeros = _spread(_whole(parts, "qzeros"), stored.bits).T  # [N, G]
    zeros = (zeros + stored.zero_offset) & (2**stored.bits - 1)
    order = _order(stored, parts.get("g_idx"), codes.shape[1])
    if order is not None:
        codes = codes[:, order]
    return _weight(stored, codes, zeros, parts["scales"], order)


def awq(stored: StoredQuantisation, parts: Mapping[str, Array | None]) -> QuantisedWeight:
    """Unpack an AWQ weight: qweight [K, N / 8], qzeros [G, N / 8], scales [G, N]. Raises
    ValueError.
    """
    codes, zeros = (
        _in_order(_spread(_whole(parts, name), stored.bits)).T for name in ("qweight", "qzeros")
    )
    return _weight(stored, codes, zeros, parts["scales"], None)


def _weight(
    stored: StoredQuantisation,
    codes: Array,
    zeros: Array,
    scales: Array | None,
    order: Array | None,
) -> QuantisedWeight:
    """Make a weight of unsigned codes [N, K], zeros [N, G] and scales [G, N]. Raises ValueError."""
    num_rows, size = codes.shape
    group = stored.group_size or -(-size // _BLOCK) * _BLOCK
    wanted = [num_rows, -(-size // group)]
    assert scales is not None
    if list(scales.T.shape) != wanted or list(zeros.shape) != wanted:
        raise ValueError(
            f"scales {list(scales.shape)} and zeros {list(zeros.T.shape)} where groups of "
            f"{stored.group_size} need {wanted[::-1]}"
        )
    if stored.bits == 8:  # backends take int8: shift unsigned codes by 128
        codes, zeros = (codes - 128).astype(np.int8), zeros - 128
    has_zeros = bool((zeros != ZERO_CODE[stored.bits]).any())
    own = np.ascontiguousarray(zeros, np.int16) if has_zeros else None
    codes = np.ascontiguousarray(codes, np.int8 if stored.bits == 8 else np.uint8)
    halves = np.ascontiguousarray(_half(scales).T)
    return QuantisedWeight(stored.bits, group, codes, halves, own, order)


def _half(scales: Array) -> Array:
    wide = to_float32(scales)
    with np.errstate(over="ignore"):  # what overflows is not equal below
        half = wide.astype(np.float16)
    if not np.array_equal(half.astype(np.float32), wide):
        found = dtype_name(scales.dtype)
        raise ValueError(f"its scales ({found}) have no place in float16; convert them")
    return half


def _whole(parts: Mapping[str, Array | None], name: str) -> Array:
    found = parts[name]
    assert found is not None
    if found.dtype != np.int32 or found.ndim != 2:
        kind, shape = dtype_name(found.dtype), list(found.shape)
        raise ValueError(f"{name} is {kind} of {shape}, not a matrix of int32")
    return found


def _spread(words: Array, bits: int) -> Array:
    """Unpack words: [R, W] int32 -> [R, W * codes per word] int16. A word's lowest bits come
    first.
    """
    shifts = np.arange(0, _WORD_BITS, bits, dtype=np.int32)
    codes: Array = (words[:, :, None] >> shifts) & (2**bits - 1)
    return codes.astype(np.int16).reshape(len(words), -1)


def _in_order(codes: Array) -> Array:
    """The codes with their columns in order: AWQ interleaves eight columns in each word."""
    words = codes.reshape(len(codes), -1, len(_AWQ_PLACES))
    return words[:, :, list(_AWQ_PLACES)].reshape(len(codes), -1)


def _order(stored: StoredQuantisation, g_idx: Array | None, size: int) -> Array | None:
    """The order that sorts the columns of codes by group: the input feature (k) of each column.
    None: the columns are sorted already. Raises ValueError.
    """
    group = stored.group_size or size
    if g_idx is None:
        if stored.reorders:
            raise ValueError("g_idx is missing, and desc_act says that it is needed")
        return None
    in_groups = np.arange(size) // group
    if np.array_equal(g_idx, in_groups):
        return None
    order: Array = g_idx.argsort(kind="stable")
    if len(g_idx) != size or not np.array_equal(g_idx[order], in_groups):
        raise ValueError(f"g_idx does not name groups of {group}")
    columns: Array = order.astype(np.int32)
    return columns
