"""What a graph and the worker of one engine replica say to each other.

The graph asks (`Ask`, each with a `call` that the answer repeats) and tells; the worker answers,
and tells of events and of itself. Both read one clock: a worker is told its offset when it starts.
"""

from typing import Literal, TypeAlias

import msgspec

from sagellm.backends.interface import ProgressEvent
from sagellm.runtime.kv.transport import BlockLocation, KVChunk
from sagellm.runtime.messages import LeaseRef, SequenceState, TokenEvent
from sagellm.runtime.port import (
    EngineFacts,
    EngineHealth,
    EngineLoad,
    LeaseOffer,
    PrefillDone,
)


class _Message(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One thing said."""


# ---- by the graph --------------------------------------------------------------------------


class Open(_Message, frozen=True, kw_only=True, tag="open"):
    """Load one replica of an engine of this graph (MessagePack); answered by `Ready`.

    `num_blocks`: of its pool in an earlier life, if it had one. `block_key`: what all engines of
    the graph hash their prefix blocks with.
    """

    graph: bytes
    engine: str
    replica: int
    block_key: bytes
    num_blocks: int | None = None


class Submit(_Message, frozen=True, kw_only=True, tag="submit"):
    """Answered by `Done` or `Refused`."""

    call: int
    state: SequenceState


class Cancel(_Message, frozen=True, kw_only=True, tag="cancel"):
    """The port's `cancel`."""

    request_id: str
    choice: int
    epoch: int


class Import(_Message, frozen=True, kw_only=True, tag="import"):
    """Reserve blocks; answered, in order of arrival, by `BlocksReserved` or `Refused`."""

    call: int
    offer: LeaseOffer


class Export(_Message, frozen=True, kw_only=True, tag="export"):
    """Turn a held lease to `sending`; answered by `Exported`, of all but the first `num_received`
    blocks, or `Refused`.
    """

    call: int
    lease: LeaseRef
    num_received: int = 0


class ExportChunk(_Message, frozen=True, kw_only=True, tag="export_chunk"):
    """A part of a prompt that is still being computed; answered by `Exported` or `Refused`."""

    call: int
    lease: LeaseRef
    chunk: KVChunk


class Receive(_Message, frozen=True, kw_only=True, tag="receive"):
    """Copy that into a reserved lease, after the first `num_received` blocks: then it is filled.
    Answered by `Done` or `Refused`.
    """

    call: int
    lease: LeaseRef
    source: BlockLocation
    num_received: int = 0


class ReceiveChunk(_Message, frozen=True, kw_only=True, tag="receive_chunk"):
    """As `Receive`, of a prompt that is still being computed: more comes after this part."""

    call: int
    lease: LeaseRef
    source: BlockLocation
    chunk: KVChunk


class Release(_Message, frozen=True, kw_only=True, tag="release"):
    """The receiver has acknowledged, or given up: free the blocks of an exported lease."""

    lease: LeaseRef


class RenewLease(_Message, frozen=True, kw_only=True, tag="renew_lease"):
    """The receiver is still at it: keep the blocks of an exported lease."""

    lease: LeaseRef


class Drop(_Message, frozen=True, kw_only=True, tag="drop"):
    """Nobody waits for that call any more; it is answered all the same."""

    call: int


class Grant(_Message, frozen=True, kw_only=True, tag="grant"):
    """The reader of `owner` took a batch of events: one more may be sent."""

    owner: str


class SyncCache(_Message, frozen=True, kw_only=True, tag="sync_cache"):
    """Report all prefix blocks that there are, and then changes, by `CacheUpdate`."""


class GrantCacheUpdate(_Message, frozen=True, kw_only=True, tag="grant_cache_update"):
    """One `CacheUpdate` was read: one more may be sent."""


class Idle(_Message, frozen=True, kw_only=True, tag="idle"):
    """Answered by `Done` when no step computes."""

    call: int


class Ping(_Message, frozen=True, kw_only=True, tag="ping"):
    """Answered by `Pong`."""


class Stop(_Message, frozen=True, kw_only=True, tag="stop"):
    """End the engine, and the process."""


# ---- by the worker -------------------------------------------------------------------------


class Ready(_Message, frozen=True, kw_only=True, tag="ready"):
    """The engine is open."""

    facts: EngineFacts


class Starting(_Message, frozen=True, kw_only=True, tag="starting"):
    """How far the start of the engine is; before `Ready`."""

    event: ProgressEvent


class Unfit(_Message, frozen=True, kw_only=True, tag="unfit"):
    """The engine cannot be opened: a fault of options, model or memory, safe to show."""

    error: str


class Done(_Message, frozen=True, kw_only=True, tag="done"):
    """The call has returned."""

    call: int


class Refused(_Message, frozen=True, kw_only=True, tag="refused"):
    """The call raised EngineRefusal, StaleLease or DamagedBlocks."""

    call: int
    kind: Literal["refusal", "stale", "damaged"]
    error: str
    code: str = ""


class BlocksReserved(_Message, frozen=True, kw_only=True, tag="blocks_reserved"):
    """Blocks are reserved under that lease."""

    call: int
    lease: LeaseRef


class Exported(_Message, frozen=True, kw_only=True, tag="exported"):
    """Where the blocks are."""

    call: int
    source: BlockLocation


class KVProgress(_Message, frozen=True, kw_only=True, tag="kv_progress"):
    """So many blocks of a prompt that is to be exported are computed, and do not change."""

    lease: LeaseRef
    num_blocks: int


class Events(_Message, frozen=True, kw_only=True, tag="events"):
    """What one step did to the sequences of `owner`; uses up one grant."""

    owner: str
    events: tuple[TokenEvent | PrefillDone, ...]
    load: EngineLoad


class CacheUpdate(_Message, frozen=True, kw_only=True, tag="cache_update"):
    """Prefix blocks that were stored and dropped, as `CacheChanged` says; uses up one grant."""

    sequence: int
    is_first: bool
    stored: bytes
    dropped: bytes


class Pong(_Message, frozen=True, kw_only=True, tag="pong"):
    """A sign of life, and how the engine is. `step_tokens`: its steps by the tokens that they
    computed, counted in buckets; `num_step_tokens`: of all of them.
    """

    load: EngineLoad
    health: EngineHealth
    step_tokens: tuple[int, ...] = ()
    num_step_tokens: float = 0.0


GraphMessage: TypeAlias = (
    Open
    | Submit
    | Cancel
    | Import
    | Export
    | ExportChunk
    | Receive
    | ReceiveChunk
    | Release
    | RenewLease
    | Drop
    | Grant
    | SyncCache
    | GrantCacheUpdate
    | Idle
    | Ping
    | Stop
)
WorkerMessage: TypeAlias = (
    Starting
    | Ready
    | Unfit
    | Done
    | Refused
    | BlocksReserved
    | Exported
    | KVProgress
    | Events
    | CacheUpdate
    | Pong
)
Message: TypeAlias = GraphMessage | WorkerMessage
