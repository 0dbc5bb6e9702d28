"""The options of one engine, as `engines:` of a graph file gives them."""

import re
from dataclasses import dataclass, field

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
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*")


class EngineOptionError(ValueError):
    """An engine option that cannot be obeyed; the message names it and says how to mend it."""


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

    `model`: a built-in name, a folder, a Hub id, or "null". `dtype` None: the model's own. The KV
    pool has `num_blocks` blocks, or as many as `kv_memory` holds ("256MiB"), or a sensible number.
    `max_step_tokens`: tokens computed in one step at most; `prefill_chunk`: of one prompt.
    `deterministic`: the same bits for a sequence whatever it is batched with. `threads` None:
    torch's choice. The last three are the cost model of device "null", which computes nothing:
    seconds a prompt token (0.0001), seconds a step (0.01), bytes a second between pools (10e9).
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
    deterministic: bool = False
    threads: int | None = field(default=None, metadata={"min": 1})
    replicas: int = field(default=1, metadata={"min": 1})
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
        self._check_costs()

    @property
    def limits(self) -> Limits:
        return Limits(self.max_num_seqs, self.max_step_tokens, self.prefill_chunk)

    @property
    def is_null(self) -> bool:
        return "null" in (self.device, self.model)

    def _check_costs(self) -> None:
        costs = ("prefill_token_s", "decode_step_s", "kv_bytes_per_s")
        given = [name for name in costs if getattr(self, name) is not None]
        if given and not self.is_null:
            raise EngineOptionError(
                f"{given[0]}: only device null takes the time it is told; drop it"
            )
