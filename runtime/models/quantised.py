"""Weights that a folder stores in few bits, as GPTQ and AWQ lay them out in safetensors.

Formats: GPTQ (arXiv:2210.17323) as AutoGPTQ and GPTQModel write it, AWQ (arXiv:2306.00978) as
AutoAWQ does in the version GEMM. No value goes through floats.
"""

from collections.abc import Iterable, Iterator, Mapping

import torch

from sagellm.backends.progress import Progress, silent
from sagellm.backends.quantised import ZERO, QuantisedWeight
from sagellm.graphs.models.quantisation import StoredQuantisation, stored_quantisation
from sagellm.runtime.models.folder import ModelError, ModelFolder
from sagellm.runtime.models.weights import Weights

_WORD_BITS = 32
_AWQ_PLACES = (0, 4, 1, 5, 2, 6, 3, 7)  # of a word's column 0, 1, 2, ...
_BLOCK = 32


class QuantisedWeights(Mapping[str, torch.Tensor | QuantisedWeight]):
    """`NAME.weight` is what NAME.qweight and its companions stand for, where these are there.

    Raises ModelError where they do not fit together.
    """

    def __init__(
        self, folder: ModelFolder, stored: StoredQuantisation, progress: Progress = silent
    ) -> None:
        self._weights = Weights(folder, progress)
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
        """The pages of all tensors; those that are read again come again."""
        self._weights.give_back()

    def loaded(self) -> None:
        """Nothing more is read."""
        self._weights.loaded()

    def require(self, names: Iterable[str]) -> None:
        """Raise ModelError for the first name that no file holds, in whatever form."""
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


def open_weights(folder: ModelFolder, progress: Progress = silent) -> Weights | QuantisedWeights:
    """The weights of a folder in whichever form. Raises ModelError, UnsupportedModel."""
    stored = stored_quantisation(folder.config)
    if stored is None:
        return Weights(folder, progress)
    return QuantisedWeights(folder, stored, progress)


def gptq(stored: StoredQuantisation, parts: Mapping[str, torch.Tensor | None]) -> QuantisedWeight:
    """qweight [K / codes a word, N], qzeros [G, N / codes a word], scales [G, N], g_idx [K].

    A g_idx that is not in order makes `order`. Raises ValueError.
    """
    codes = _spread(_whole(parts, "qweight").T, stored.bits)  # [N, K]
    zeros = _spread(_whole(parts, "qzeros"), stored.bits).T  # [N, G]
    zeros = (zeros + stored.zero_offset) & (2**stored.bits - 1)
    order = _order(stored, parts.get("g_idx"), codes.shape[1])
    if order is not None:
        codes = codes[:, order]
    return _weight(stored, codes, zeros, parts["scales"], order)


def awq(stored: StoredQuantisation, parts: Mapping[str, torch.Tensor | None]) -> QuantisedWeight:
    """qweight [K, N / 8], qzeros [G, N / 8], scales [G, N]. Raises ValueError."""
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
    """Codes and zeros as the format has them, from 0: [N, K] and [N, G]."""
    num_rows, size = codes.shape
    group = stored.group_size or -(-size // _BLOCK) * _BLOCK
    wanted = [num_rows, -(-size // group)]
    assert scales is not None
    if list(scales.T.shape) != wanted or list(zeros.shape) != wanted:
        raise ValueError(
            f"scales {list(scales.shape)} and zeros {list(zeros.T.shape)} where groups of "
            f"{stored.group_size} need {wanted[::-1]}"
        )
    if stored.bits == 8:  # codes of int8: all are less by 128
        codes, zeros = (codes - 128).to(torch.int8), zeros - 128
    own = None if bool((zeros == ZERO[stored.bits]).all()) else zeros.short().contiguous()
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
    """[R, W] int32 -> [R, W * codes a word] int16, a word's lowest bits first."""
    shifts = torch.arange(0, _WORD_BITS, bits, dtype=torch.int32)
    codes: torch.Tensor = (words.unsqueeze(-1) >> shifts) & (2**bits - 1)
    return codes.short().flatten(1)


def _in_order(codes: torch.Tensor) -> torch.Tensor:
    """AWQ's columns, which lie interleaved in each word."""
    return codes.view(len(codes), -1, len(_AWQ_PLACES))[:, :, list(_AWQ_PLACES)].flatten(1)


def _order(
    stored: StoredQuantisation, g_idx: torch.Tensor | None, size: int
) -> torch.Tensor | None:
    """Which k each column of codes is to be for, so that groups lie together; None: as it is."""
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
