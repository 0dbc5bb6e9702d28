"""What was counted of the requests for one model: plain integers and buckets, cheap to change."""

import copy
from dataclasses import dataclass, field, fields

from sagellm.gateway.metrics import bounds
from sagellm.runtime.buckets import Buckets
from sagellm.runtime.messages import CODES, PRIORITIES

CLASSES = {number: name for name, number in PRIORITIES.items()}
OTHER = "other"
PHASES = ("queue", "prefill", "transfer", "decode")


_BOUNDS = {
    "ttft": bounds.TTFT_S,
    "itl": bounds.TOKEN_S,
    "tpot": bounds.TOKEN_S,
    "e2e": bounds.REQUEST_S,
    "queue": bounds.REQUEST_S,
    "inference": bounds.REQUEST_S,
    "prefill": bounds.REQUEST_S,
    "decode": bounds.REQUEST_S,
    "kv_transfer": bounds.PHASE_S,
    "num_choices": bounds.CHOICES,
    "num_preemptions": bounds.PREEMPTIONS,
}
_LENGTHS = ("prompt_len", "computed_len", "generation_len", "longest_len", "max_tokens")


@dataclass(slots=True)
class Counts:
    """Since the start. Choices are counted as requests, as the ledger does.

    `lengths`: the bounds for numbers of tokens. TTFT, ITL and end-to-end times end where an item
    is delivered; the other times are those of the stamps.
    """

    lengths: tuple[int, ...]
    num_accepted: int = 0
    ended: dict[str, int] = field(default_factory=dict)  # finish reason -> requests
    rejected: dict[tuple[str, str], int] = field(default_factory=dict)  # (code, priority class)
    prompt_tokens: int = 0
    cached_tokens: int = 0
    generation_tokens: int = 0
    goodput_tokens: int = 0
    kv_transfer_bytes: int = 0
    kv_transfer_tokens: int = 0
    ttft: Buckets = field(init=False)
    itl: Buckets = field(init=False)
    tpot: Buckets = field(init=False)
    e2e: Buckets = field(init=False)
    queue: Buckets = field(init=False)
    inference: Buckets = field(init=False)
    prefill: Buckets = field(init=False)
    decode: Buckets = field(init=False)
    kv_transfer: Buckets = field(init=False)
    num_choices: Buckets = field(init=False)
    num_preemptions: Buckets = field(init=False)  # of a choice that an engine began
    prompt_len: Buckets = field(init=False)
    computed_len: Buckets = field(init=False)
    generation_len: Buckets = field(init=False)
    longest_len: Buckets = field(init=False)  # of all choices of a request
    max_tokens: Buckets = field(init=False)
    phases: dict[str, Buckets] = field(init=False)

    def __post_init__(self) -> None:
        for name, which in (*_BOUNDS.items(), *((name, self.lengths) for name in _LENGTHS)):
            setattr(self, name, Buckets(which))
        self.phases = {phase: Buckets(bounds.PHASE_S) for phase in PHASES}

    @property
    def num_open(self) -> int:
        return self.num_accepted - sum(self.ended.values())

    def end(self, reason: str) -> None:
        self.ended[reason] = self.ended.get(reason, 0) + 1

    def reject(self, code: str, priority: int) -> None:
        key = code if code in CODES else OTHER, CLASSES.get(priority, OTHER)
        self.rejected[key] = self.rejected.get(key, 0) + 1

    def snapshot(self) -> "Counts":
        """What was counted so far; it changes no more."""
        copied = copy.copy(self)
        for each in fields(self):
            value = getattr(self, each.name)
            if isinstance(value, Buckets | dict):
                setattr(copied, each.name, value.copy())
        copied.phases = {phase: buckets.copy() for phase, buckets in self.phases.items()}
        return copied
