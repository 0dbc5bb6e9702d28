"""The options of one engine, as `engines:` of a graph file gives them."""

import re
from dataclasses import dataclass, field

from sagellm.backends.quantised import MODES
from sagellm.graphs.vocabulary import nearest
from sagellm.runtime.engine.limits import Limits

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
_SPECULATIONS = ("ngram", "draft")
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*")


class EngineOptionError(ValueError):
    """An engine option that cannot be obeyed; the message names it and says how to fix it."""


def num_bytes(size: str) -> int:
    """Bytes of "256MiB", "1.5 GB" or "4096". Raises EngineOptionError."""
    match = _SIZE.fullmatch(size)
    if match is None or match[2] not in _UNITS:
        units = ", ".join(unit for unit in _UNITS if unit)
        raise EngineOptionError(
            f"kv_memory: {size!r} is not a size; write a number and one of {units}"
        )
    return int(float(match[1]) * _UNITS[match[2]])


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """Raises EngineOptionError for values that no engine can obey.

    `model`: a built-in name, a folder, a Hub id, or "null". `device`: a backend, and which of its
    devices ("cpu", "cuda:1"); without a number, replicas take them in turn. `dtype` None:
    the model's own. The KV pool has `num_blocks` blocks, or as many as `kv_memory` holds
    ("256MiB"), or a sensible number.
    `max_step_tokens`: tokens computed in one step at most; `prefill_chunk`: of one prompt.
    `prefix_caching`: blocks of ended sequences are kept, and reused where a prompt begins alike.
    `deterministic`: the same bits for a sequence whatever it is batched with. `threads` None:
    torch's choice. `quantization`, one of MODES: the form in which weights of linears are kept and
    multiplied; None: as they are stored. `speculation`: "ngram" drafts from a sequence's own
    tokens, "draft" with the model `draft_model`, which has the same vocabulary; at most
    `num_draft_tokens` (4) a step. The last three are the cost model of device "null", which
    computes nothing: seconds a prompt token (0.0001), seconds a step (0.01), bytes a second between
    pools (10e9).
    """

    model: str = "sage-tiny"
    device: str = "cpu"
    dtype: str | None = None
    block_size: int = field(default=16, metadata={"min": 1})
    num_blocks: int | None = field(default=None, metadata={"min": 1})
    kv_memory: str | None = None
    max_model_len: int | None = field(default=None, metadata={"min": 2})
    max_num_seqs: int = field(default=64, metadata={"min": 1})
    max_step_tokens: int = field(default=512, metadata={"min": 2})
    prefill_chunk: int | None = field(default=None, metadata={"min": 1})
    prefix_caching: bool = True
    deterministic: bool = False
    quantization: str | None = None
    threads: int | None = field(default=None, metadata={"min": 1})
    replicas: int = field(default=1, metadata={"min": 1})
    speculation: str | None = None
    draft_model: str | None = None
    num_draft_tokens: int | None = field(default=None, metadata={"min": 1})
    prefill_token_s: float | None = field(default=None, metadata={"min": 0})
    decode_step_s: float | None = field(default=None, metadata={"min": 0})
    kv_bytes_per_s: float | None = field(default=None, metadata={"min": 1})

    def __post_init__(self) -> None:
        for name, option in self.__dataclass_fields__.items():
            value, least = getattr(self, name), option.metadata.get("min")
            if least is not None and value is not None and value < least:
                raise EngineOptionError(f"{name}: {value} is too small; give at least {least}")
        if self.num_blocks is not None and self.kv_memory is not None:
            raise EngineOptionError("num_blocks and kv_memory both size the KV pool; give one")
        if self.kv_memory is not None:
            num_bytes(self.kv_memory)
        self._check_device()
        self._check_costs()
        self._check_speculation()
        self._check_quantization()

    @property
    def limits(self) -> Limits:
        return Limits(
            self.max_num_seqs, self.max_step_tokens, self.prefill_chunk, self.prefix_caching
        )

    @property
    def num_drafted(self) -> int:
        """Tokens to draft for a sequence in one step at most, where any are."""
        return 4 if self.num_draft_tokens is None else self.num_draft_tokens

    @property
    def is_null(self) -> bool:
        return "null" in (self.backend, self.model)

    @property
    def backend(self) -> str:
        """The name of the backend that `device` names."""
        return self.device.partition(":")[0]

    @property
    def device_index(self) -> int | None:
        """The one of its devices; None: each replica takes the next."""
        _, colon, index = self.device.partition(":")
        return int(index) if colon else None

    def _check_device(self) -> None:
        name, colon, index = self.device.partition(":")
        if colon and not index.isdecimal():
            raise EngineOptionError(
                f"device: {self.device!r} has no number after the colon; write {name} or {name}:0"
            )

    def _check_costs(self) -> None:
        costs = ("prefill_token_s", "decode_step_s", "kv_bytes_per_s")
        given = [name for name in costs if getattr(self, name) is not None]
        if given and not self.is_null:
            raise EngineOptionError(
                f"{given[0]}: only device null takes the time it is told; drop it"
            )

    def _check_speculation(self) -> None:
        if self.speculation is None:
            for name in ("draft_model", "num_draft_tokens"):
                if getattr(self, name) is not None:
                    raise EngineOptionError(f"{name}: nothing is drafted without speculation")
            return
        if self.speculation not in _SPECULATIONS:
            close = nearest(self.speculation, _SPECULATIONS)
            fix = f"did you mean {close}?" if close else f"use {' or '.join(_SPECULATIONS)}"
            raise EngineOptionError(f"speculation: {self.speculation!r} is unknown; {fix}")
        if self.is_null:
            raise EngineOptionError(
                "speculation: device null computes nothing that could verify a draft; drop it"
            )
        if self.speculation == "draft" and self.draft_model is None:
            raise EngineOptionError("speculation: draft needs draft_model; name one, or use ngram")
        if self.speculation != "draft" and self.draft_model is not None:
            raise EngineOptionError(
                f"draft_model: speculation {self.speculation} uses none; set speculation: draft, "
                "or drop it"
            )
        if self.num_drafted >= self.max_step_tokens:
            raise EngineOptionError(
                f"num_draft_tokens: {self.num_drafted} and the token before them exceed "
                f"max_step_tokens: {self.max_step_tokens}; give fewer"
            )

    def _check_quantization(self) -> None:
        mode = self.quantization
        if mode is not None and mode not in MODES:
            close = nearest(mode, MODES)
            fix = f"did you mean {close}?" if close else f"use {', '.join(MODES)}"
            raise EngineOptionError(f"quantization: {mode!r} is unknown; {fix}")
        if mode is not None and self.is_null:
            raise EngineOptionError("quantization: device null computes nothing; drop it")
