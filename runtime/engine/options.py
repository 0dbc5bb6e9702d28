"""Options of engines with a KV pool, and the limits of a scheduler that follow from them."""

import re
from dataclasses import dataclass, field
from typing import Any, Protocol

from sagellm.backends.quantised_weight import MODES
from sagellm.graphs.vocabulary import (
    GRAMMARS,
    KV_TRANSFER,
    LOGPROBS,
    RESUME,
    TEXT_OUT,
    TOKENS_IN,
    TOKENS_OUT,
    nearest,
)


@dataclass(frozen=True, slots=True)
class Limits:
    """The limits of one step, and whether prefixes are cached.

    `max_num_seqs`: the most sequences of a step. `max_num_batched_tokens`: the most tokens of a
    step. `prefill_chunk`: the most tokens of one prompt in a step; None: as many as fit.
    """

    max_num_seqs: int
    max_num_batched_tokens: int
    prefill_chunk: int | None = None
    prefix_caching: bool = True

    @property
    def max_chunk(self) -> int:
        """The most tokens of one sequence that a step computes."""
        return min(self.max_num_batched_tokens, self.prefill_chunk or self.max_num_batched_tokens)


_UNITS = {
    "": 1,
    "B": 1,
    "KiB": 2**10,
    "MiB": 2**20,
    "GiB": 2**30,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
}
LOCAL_CAPABILITIES = frozenset(
    {TOKENS_IN, TOKENS_OUT, TEXT_OUT, KV_TRANSFER, RESUME, LOGPROBS, GRAMMARS}
)
_SPECULATIONS = ("ngram", "draft")
KV_CACHE_DTYPES = ("auto", "int8")
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*")


class EngineOptionError(ValueError):
    """An engine option has an invalid value. The message names the option and a fix."""


def num_bytes(size: str) -> int:
    """Bytes of "256MiB", "1.5 GB" or "4096". Raises EngineOptionError."""
    match = _SIZE.fullmatch(size)
    if match is None or match[2] not in _UNITS:
        units = ", ".join(unit for unit in _UNITS if unit)
        raise EngineOptionError(
            f"kv_memory: {size!r} is not a size; write a number and one of {units}"
        )
    return int(float(match[1]) * _UNITS[match[2]])


class SizedOptions(Protocol):
    """The options that determine the pool size and the facts of an engine. `quantization`: the form
    of the weights in memory.
    """

    @property
    def model(self) -> str: ...
    @property
    def dtype(self) -> str | None: ...
    @property
    def kv_cache_dtype(self) -> str: ...
    @property
    def block_size(self) -> int: ...
    @property
    def num_blocks(self) -> int | None: ...
    @property
    def kv_memory(self) -> str | None: ...
    @property
    def max_model_len(self) -> int | None: ...
    @property
    def max_num_seqs(self) -> int: ...
    @property
    def quantization(self) -> str | None: ...
    @property
    def replicas(self) -> int: ...
    @property
    def limits(self) -> Limits: ...
    @property
    def capabilities(self) -> frozenset[str]: ...


@dataclass(frozen=True, slots=True)
class PagedOptions:
    """The options of an engine that schedules batches over a paged KV pool. Raises
    EngineOptionError for invalid values.

    `model`: a built-in name, a folder, a Hub id, or "null". `dtype` None: the model's own.
    `kv_cache_dtype`, one of KV_CACHE_DTYPES: the form of keys and values; "auto": as `dtype`. The
    KV pool has `num_blocks` blocks, or as many as `kv_memory` holds ("256MiB"); without either, the
    number follows from the free memory. `max_num_batched_tokens`: the most tokens of one step.
    `prefill_chunk`: the most tokens of one prompt in a step. `prefix_caching`: keep blocks of ended
    sequences for prompts that begin alike.
    """

    model: str = "sage-tiny"
    dtype: str | None = None
    kv_cache_dtype: str = "auto"
    block_size: int = field(default=16, metadata={"min": 1})
    num_blocks: int | None = field(default=None, metadata={"min": 1})
    kv_memory: str | None = None
    max_model_len: int | None = field(default=None, metadata={"min": 2})
    max_num_seqs: int = field(default=64, metadata={"min": 1})
    max_num_batched_tokens: int = field(
        default=512, metadata={"min": 2, "old_name": "max_step_tokens"}
    )
    prefill_chunk: int | None = field(default=None, metadata={"min": 1})
    prefix_caching: bool = True
    replicas: int = field(default=1, metadata={"min": 1})

    def __post_init__(self) -> None:
        check_least(self)
        if self.num_blocks is not None and self.kv_memory is not None:
            raise EngineOptionError("num_blocks and kv_memory both size the KV pool; give one")
        if self.kv_memory is not None:
            num_bytes(self.kv_memory)
        check_known("kv_cache_dtype", self.kv_cache_dtype, KV_CACHE_DTYPES, " or ")

    @property
    def limits(self) -> Limits:
        return Limits(
            self.max_num_seqs, self.max_num_batched_tokens, self.prefill_chunk, self.prefix_caching
        )


class OnDevice:
    """Options of an engine with an option `device`: a backend, and which of its devices."""

    __slots__ = ()
    device: str

    @property
    def backend(self) -> str:
        """The name of the backend that `device` names."""
        return self.device.partition(":")[0]

    @property
    def device_index(self) -> int | None:
        """The number of the device; None: each replica takes the next device."""
        _, colon, index = self.device.partition(":")
        return int(index) if colon else None

    def check_device(self) -> None:
        """Raises EngineOptionError for a device without the number that it announces."""
        name, colon, index = self.device.partition(":")
        if colon and not index.isdecimal():
            raise EngineOptionError(
                f"device: {self.device!r} has no number after the colon; write {name} or {name}:0"
            )


@dataclass(frozen=True, slots=True)
class EngineOptions(OnDevice, PagedOptions):
    """The options of kind `local`. Raises EngineOptionError for invalid values.

    `device`: a backend, and which of its devices ("cpu", "cuda:1"); without a number, replicas take
    devices in turn. `deterministic`: compute the same bits for a sequence whatever other sequences
    are in its batches. `threads` None: the device's own. `quantization`, one of MODES: the form in
    which weights of linears are kept and multiplied; None: as they are stored. `speculation`:
    "ngram" drafts from a sequence's own tokens, "draft" with the model `draft_model`, which has the
    same vocabulary. `num_draft_tokens`: the most drafts of a sequence in a step; None: 4.
    """

    device: str = "cpu"
    deterministic: bool = False
    quantization: str | None = None
    threads: int | None = field(default=None, metadata={"min": 1})
    speculation: str | None = None
    draft_model: str | None = None
    num_draft_tokens: int | None = field(default=None, metadata={"min": 1})

    def __post_init__(self) -> None:
        PagedOptions.__post_init__(self)
        self._check_device()
        self._check_speculation()
        self._check_quantization()

    @property
    def capabilities(self) -> frozenset[str]:
        """The capabilities of an engine with these options."""
        return LOCAL_CAPABILITIES

    @property
    def num_drafted(self) -> int:
        """The most tokens to draft for a sequence in one step, if `speculation` is set."""
        return 4 if self.num_draft_tokens is None else self.num_draft_tokens

    def _check_device(self) -> None:
        self.check_device()
        for option, value in (("device", self.backend), ("model", self.model)):
            if value == "null":
                raise EngineOptionError(
                    f"{option}: null computes nothing, and kind local does; write kind: modelled"
                )

    def _check_speculation(self) -> None:
        if self.speculation is None:
            for name in ("draft_model", "num_draft_tokens"):
                if getattr(self, name) is not None:
                    raise EngineOptionError(f"{name}: nothing is drafted without speculation")
            return
        check_known("speculation", self.speculation, _SPECULATIONS, " or ")
        if self.speculation == "draft" and self.draft_model is None:
            raise EngineOptionError("speculation: draft needs draft_model; name one, or use ngram")
        if self.speculation != "draft" and self.draft_model is not None:
            raise EngineOptionError(
                f"draft_model: speculation {self.speculation} uses none; set speculation: draft, "
                "or drop it"
            )
        # A token and its drafts are computed in one step.
        if self.num_drafted >= self.max_num_batched_tokens:
            raise EngineOptionError(
                f"num_draft_tokens: {self.num_drafted} and the token before them exceed "
                f"max_num_batched_tokens: {self.max_num_batched_tokens}; give fewer"
            )

    def _check_quantization(self) -> None:
        if self.quantization is not None:
            check_known("quantization", self.quantization, tuple(MODES), ", ")


def check_known(option: str, name: str, known: tuple[str, ...], comma: str) -> None:
    """Raises EngineOptionError for a name that is not `known`."""
    if name not in known:
        close = nearest(name, known)
        fix = f"did you mean {close}?" if close else f"use {comma.join(known)}"
        raise EngineOptionError(f"{option}: {name!r} is unknown; {fix}")


def check_least(options: Any) -> None:
    """Raises EngineOptionError for a field below its metadata `min`."""
    for name, option in options.__dataclass_fields__.items():
        value, least = getattr(options, name), option.metadata.get("min")
        # The checks of graphs compare with `min` too; Python callers come here unchecked.
        if least is not None and value is not None and value < least:
            raise EngineOptionError(f"{name}: {value} is too small; give at least {least}")


def float_dtype(given: str | None, stored: str) -> str:
    """The dtype of weights in memory. `given`: the option `dtype`. Float16 models are computed in
    float32. Raises EngineOptionError.
    """
    dtype = given or stored
    if dtype not in ("float32", "bfloat16", "float16"):
        raise EngineOptionError(f"dtype: {dtype!r} is unknown; use float32 or bfloat16")
    if given == "float16":
        raise EngineOptionError("dtype: float16 is not built; use float32 or bfloat16")
    return "float32" if dtype == "float16" else dtype
