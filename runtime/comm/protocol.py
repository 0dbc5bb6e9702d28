"""What a graph and the worker of one engine replica say to each other.

The graph asks (`Ask`, each with a `call` that the answer repeats) and tells; the worker answers,
and tells of events and of itself. Both read one clock: a worker is told its offset when it starts.
"""

from typing import Literal, TypeAlias

import msgspec

from sagellm.backends.progress import Event
from sagellm.runtime.kv.located import Located
from sagellm.runtime.kv.part import Part
from sagellm.runtime.messages import LeaseRef, SequenceState, TokenEvent
from sagellm.runtime.port import (
    EngineFacts,
    EngineHealth,
    EngineLoad,
    LeaseOffer,
    PrefillDone,
)


class _Said(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One thing said."""


# ---- by the graph --------------------------------------------------------------------------


class Open(_Said, frozen=True, kw_only=True, tag="open"):
    """Load one replica of an engine of this graph (MessagePack); answered by `Ready`.

    `num_blocks`: of its pool in an earlier life, if it had one. `block_key`: what all engines of
    the graph hash their prefix blocks with.
    """

    graph: bytes
    engine: str
    replica: int
    block_key: bytes
    num_blocks: int | None = None


class Submit(_Said, frozen=True, kw_only=True, tag="submit"):
    """Answered by `Done` or `Refused`."""

    call: int
    state: SequenceState


class Cancel(_Said, frozen=True, kw_only=True, tag="cancel"):
    """The port's `cancel`."""

    request_id: str
    choice: int
    epoch: int


class Import(_Said, frozen=True, kw_only=True, tag="import"):
    """Reserve blocks; answered, in order of arrival, by `Landing` or `Refused`."""

    call: int
    offer: LeaseOffer


class Export(_Said, frozen=True, kw_only=True, tag="export"):
    """Turn a held lease to `sending`; answered by `Exported`, of all but the first `num_landed`
    blocks, or `Refused`.
    """

    call: int
    lease: LeaseRef
    num_landed: int = 0


class ExportPart(_Said, frozen=True, kw_only=True, tag="export_part"):
    """A part of a prompt that is still being computed; answered by `Exported` or `Refused`."""

    call: int
    lease: LeaseRef
    part: Part


class Receive(_Said, frozen=True, kw_only=True, tag="receive"):
    """Copy that into a reserved lease, after the first `num_landed` blocks: then it is filled.
    Answered by `Done` or `Refused`.
    """

    call: int
    lease: LeaseRef
    source: Located
    num_landed: int = 0


class ReceivePart(_Said, frozen=True, kw_only=True, tag="receive_part"):
    """As `Receive`, of a prompt that is still being computed: more comes after this part."""

    call: int
    lease: LeaseRef
    source: Located
    part: Part


class Release(_Said, frozen=True, kw_only=True, tag="release"):
    """The receiver has acknowledged, or given up: free the blocks of an exported lease."""

    lease: LeaseRef


class Hold(_Said, frozen=True, kw_only=True, tag="hold"):
    """The receiver is still at it: keep the blocks of an exported lease."""

    lease: LeaseRef


class Drop(_Said, frozen=True, kw_only=True, tag="drop"):
    """Nobody waits for that call any more; it is answered all the same."""

    call: int


class Grant(_Said, frozen=True, kw_only=True, tag="grant"):
    """The reader of `owner` took a batch of events: one more may be sent."""

    owner: str


class AskCache(_Said, frozen=True, kw_only=True, tag="ask_cache"):
    """Report all prefix blocks that there are, and then changes, by `CacheNews`."""


class GrantCache(_Said, frozen=True, kw_only=True, tag="grant_cache"):
    """One `CacheNews` was read: one more may be sent."""


class Idle(_Said, frozen=True, kw_only=True, tag="idle"):
    """Answered by `Done` when no step computes."""

    call: int


class Ping(_Said, frozen=True, kw_only=True, tag="ping"):
    """Answered by `Pong`."""


class Stop(_Said, frozen=True, kw_only=True, tag="stop"):
    """End the engine, and the process."""


# ---- by the worker -------------------------------------------------------------------------


class Ready(_Said, frozen=True, kw_only=True, tag="ready"):
    """The engine is open."""

    facts: EngineFacts


class Starting(_Said, frozen=True, kw_only=True, tag="starting"):
    """How far the start of the engine is; before `Ready`."""

    event: Event


class Unfit(_Said, frozen=True, kw_only=True, tag="unfit"):
    """The engine cannot be opened: a fault of options, model or memory, safe to show."""

    error: str


class Done(_Said, frozen=True, kw_only=True, tag="done"):
    """The call has returned."""

    call: int


class Refused(_Said, frozen=True, kw_only=True, tag="refused"):
    """The call raised EngineRefusal, StaleLease or DamagedBlocks."""

    call: int
    kind: Literal["refusal", "stale", "damaged"]
    error: str
    code: str = ""


class Landing(_Said, frozen=True, kw_only=True, tag="landing"):
    """Blocks are reserved under that lease."""

    call: int
    lease: LeaseRef


class Exported(_Said, frozen=True, kw_only=True, tag="exported"):
    """Where the blocks are."""

    call: int
    source: Located


class Advanced(_Said, frozen=True, kw_only=True, tag="advanced"):
    """So many blocks of a prompt that is to be exported are computed, and do not change."""

    lease: LeaseRef
    num_blocks: int


class Events(_Said, frozen=True, kw_only=True, tag="events"):
    """What one step did to the sequences of `owner`; uses up one grant."""

    owner: str
    events: tuple[TokenEvent | PrefillDone, ...]
    load: EngineLoad


class CacheNews(_Said, frozen=True, kw_only=True, tag="cache_news"):
    """Prefix blocks that were stored and dropped, as `CacheChanged` says; uses up one grant."""

    sequence: int
    is_first: bool
    stored: bytes
    dropped: bytes


class Pong(_Said, frozen=True, kw_only=True, tag="pong"):
    """A sign of life, and how the engine is. `step_tokens`: its steps by the tokens that they
    computed, counted in buckets; `num_step_tokens`: of all of them.
    """

    load: EngineLoad
    health: EngineHealth
    step_tokens: tuple[int, ...] = ()
    num_step_tokens: float = 0.0


FromGraph: TypeAlias = (
    Open
    | Submit
    | Cancel
    | Import
    | Export
    | ExportPart
    | Receive
    | ReceivePart
    | Release
    | Hold
    | Drop
    | Grant
    | AskCache
    | GrantCache
    | Idle
    | Ping
    | Stop
)
FromWorker: TypeAlias = (
    Starting
    | Ready
    | Unfit
    | Done
    | Refused
    | Landing
    | Exported
    | Advanced
    | Events
    | CacheNews
    | Pong
)
Message: TypeAlias = FromGraph | FromWorker
