"""A model's weights in safetensors files, plain or quantised.

Quantised formats: GPTQ (arXiv:2210.17323) as AutoGPTQ and GPTQModel write it, AWQ
(arXiv:2306.00978) as AutoAWQ writes it in the version GEMM. Codes are never converted to floats.
"""

import ctypes
import mmap
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Protocol, cast

import torch
from safetensors import SafetensorError, safe_open

from sagellm.backends.interface import Loading, Progress, silent
from sagellm.backends.quantised_weight import ZERO_CODE, QuantisedWeight
from sagellm.graphs.ir import Graph
from sagellm.graphs.models.config import StoredQuantisation, stored_quantisation
from sagellm.graphs.vocabulary import nearest
from sagellm.runtime.models.folder import ModelError, ModelFolder, shard_files

_MAPS = Path("/proc/self/maps")


def drop_pages(files: Iterable[Path]) -> None:
    """Drop the resident pages of mapped files from this process. Only Linux can do this; elsewhere
    the function does nothing.

    The memory stays valid: the system reads the pages again when they are used. Writes to a private
    mapping are lost.
    """
    advise = ctypes.CDLL(None).madvise
    advise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    for low, high in _mapped({str(file.resolve()) for file in files}):
        advise(low, high - low, mmap.MADV_DONTNEED)


def _mapped(names: set[str]) -> Iterator[tuple[int, int]]:
    """The address ranges where this process has mapped the files."""
    if not _MAPS.exists():
        return
    for line in _MAPS.read_text().splitlines():
        places, *_, name = line.split(maxsplit=5)
        if name in names:
            low, _, high = places.partition("-")
            yield int(low, 16), int(high, 16)


_HELD_BYTES = 32 << 20  # mapped pages are dropped each time this number of bytes has been read


class _Shard(Protocol):
    """An open safetensors file, whose library has no types."""

    def keys(self) -> list[str]: ...

    def get_tensor(self, name: str) -> torch.Tensor: ...


class SafetensorsWeights(Mapping[str, torch.Tensor]):
    """Maps names to tensors. Headers are read at once; a tensor is read from disk at each access.

    Pages that were read are dropped at intervals, so that the memory does not hold the weights
    twice while a backend copies them. The tensors stay valid, but must not be written to.

    `progress` is called with the number of bytes that have been read. Raises ModelError if a file
    is damaged, or lacks a tensor that the index promises.
    """

    def __init__(self, folder: ModelFolder, progress: Progress = silent) -> None:
        if folder.path is None:
            raise ModelError(f"model {folder.name} has no weights")
        self._folder = folder.name
        self._files: dict[str, _Shard] = {}
        self._paths: list[Path] = []
        self._unreturned_bytes = 0
        self._progress = progress
        self._read_bytes = self._told_bytes = 0
        for file, promised in shard_files(folder.name, folder.path).items():
            held = self._open(folder.path / file, file)
            missing = sorted(set(promised) - set(held.keys()))
            if missing:
                raise ModelError(f"model {folder.name}: {file} lacks tensor {missing[0]}")
            self._files.update(dict.fromkeys(held.keys(), held))
            self._paths.append(folder.path / file)
        self._total_bytes = sum(path.stat().st_size for path in self._paths)

    def __getitem__(self, name: str) -> torch.Tensor:
        tensor = self._files[name].get_tensor(name)
        if self._unreturned_bytes >= _HELD_BYTES:
            self.give_back()
        self._unreturned_bytes += tensor.nbytes
        self._tell(tensor.nbytes)
        return tensor

    def __contains__(self, name: object) -> bool:
        return name in self._files  # without reading it

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)

    def give_back(self) -> None:
        """Drop the resident pages of all tensors. A page that is used again is read again."""
        drop_pages(self._paths)
        self._unreturned_bytes = 0

    def loaded(self) -> None:
        """Report full progress. Tensors that were not read are not needed, or are read later."""
        self._progress(Loading(self._folder, self._total_bytes, self._total_bytes))

    def _tell(self, num_bytes: int) -> None:
        """Add to the progress, and report it at intervals. It stays below the total, even if
        tensors are read twice.
        """
        self._read_bytes = min(self._read_bytes + num_bytes, self._total_bytes - 1)
        if self._read_bytes - self._told_bytes >= _HELD_BYTES:
            self._told_bytes = self._read_bytes
            self._progress(Loading(self._folder, self._read_bytes, self._total_bytes))

    def require(self, names: Iterable[str]) -> None:
        """Raise ModelError for the first name that no file holds."""
        for name in names:
            if name not in self._files:
                close = nearest(name, list(self._files))
                hint = f"; the nearest there is {close}" if close else ""
                raise ModelError(f"model {self._folder}: tensor {name} is missing{hint}")

    def _open(self, path: object, file: str) -> _Shard:
        try:
            return cast(_Shard, safe_open(str(path), framework="pt"))
        except (SafetensorError, OSError) as error:
            raise ModelError(f"model {self._folder}: {file} cannot be read: {error}") from error


def weight_names(graph: Graph) -> tuple[str, ...]:
    """The tensors that a kernel graph reads, in the order of its nodes."""
    named = (node.attrs.get(key) for node in graph.nodes for key in ("weight", "bias"))
    return tuple(dict.fromkeys(name for name in named if isinstance(name, str) and name))


_WORD_BITS = 32
_AWQ_PLACES = (0, 4, 1, 5, 2, 6, 3, 7)  # the place in a word of columns 0, 1, 2, ...
_BLOCK = 32


class PackedWeights(Mapping[str, torch.Tensor | QuantisedWeight]):
    """Maps names to weights. If the folder stores `NAME.qweight`, `NAME.qzeros` and `NAME.scales`,
    an access to `NAME.weight` unpacks a quantised weight from these three tensors.

    The access raises ModelError if the tensors do not fit together.
    """

    def __init__(
        self, folder: ModelFolder, stored: StoredQuantisation, progress: Progress = silent
    ) -> None:
        self._weights = SafetensorsWeights(folder, progress)
        self._folder = folder.name
        self._stored = stored

    def __getitem__(self, name: str) -> torch.Tensor | QuantisedWeight:
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


def gptq(stored: StoredQuantisation, parts: Mapping[str, torch.Tensor | None]) -> QuantisedWeight:
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


def awq(stored: StoredQuantisation, parts: Mapping[str, torch.Tensor | None]) -> QuantisedWeight:
    """Unpack an AWQ weight: qweight [K, N / 8], qzeros [G, N / 8], scales [G, N]. Raises
    ValueError.
    """
    codes, zeros = (
        _in_order(_spread(_whole(parts, name), stored.bits)).T for name in ("qweight", "qzeros")
    )
    return _weight(stored, codes, zeros, parts["scales"], None)


def _weight(
    stored: StoredQuantisation,
    codes: torch.Tensor,
    zeros: torch.Tensor,
    scales: torch.Tensor | None,
    order: torch.Tensor | None,
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
        codes, zeros = (codes - 128).to(torch.int8), zeros - 128
    own = None if bool((zeros == ZERO_CODE[stored.bits]).all()) else zeros.short().contiguous()
    codes = codes if stored.bits == 8 else codes.to(torch.uint8)
    return QuantisedWeight(
        stored.bits, group, codes.contiguous(), _half(scales).T.contiguous(), own, order
    )


def _half(scales: torch.Tensor) -> torch.Tensor:
    half = scales.half()
    if not torch.equal(half.float(), scales.float()):
        raise ValueError(f"its scales ({scales.dtype}) have no place in float16; convert them")
    return half


def _whole(parts: Mapping[str, torch.Tensor | None], name: str) -> torch.Tensor:
    found = parts[name]
    assert found is not None
    if found.dtype != torch.int32 or found.dim() != 2:
        raise ValueError(f"{name} is {found.dtype} of {list(found.shape)}, not a matrix of int32")
    return found


def _spread(words: torch.Tensor, bits: int) -> torch.Tensor:
    """Unpack words: [R, W] int32 -> [R, W * codes per word] int16. A word's lowest bits come
    first.
    """
    shifts = torch.arange(0, _WORD_BITS, bits, dtype=torch.int32)
    codes: torch.Tensor = (words.unsqueeze(-1) >> shifts) & (2**bits - 1)
    return codes.short().flatten(1)


def _in_order(codes: torch.Tensor) -> torch.Tensor:
    """The codes with their columns in order: AWQ interleaves eight columns in each word."""
    return codes.view(len(codes), -1, len(_AWQ_PLACES))[:, :, list(_AWQ_PLACES)].flatten(1)


def _order(
    stored: StoredQuantisation, g_idx: torch.Tensor | None, size: int
) -> torch.Tensor | None:
    """The order that sorts the columns of codes by group: the input feature (k) of each column.
    None: the columns are sorted already. Raises ValueError.
    """
    group = stored.group_size or size
    if g_idx is None:
        if stored.reorders:
            raise ValueError("g_idx is missing, and desc_act says that it is needed")
        return None
    in_groups = torch.arange(size) // group
    if torch.equal(g_idx.long(), in_groups):
        return None
    order = g_idx.long().argsort(stable=True)
    if len(g_idx) != size or not torch.equal(g_idx.long()[order], in_groups):
        raise ValueError(f"g_idx does not name groups of {group}")
    return order.int()
