"""The messages between a graph and the worker of one engine replica.

The graph sends calls, whose `call` number the answer repeats, and notices. The worker sends
answers, events and its own state. Both read one clock: a worker gets its offset when it starts.
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
    """One message."""


# ---- sent by the graph ---------------------------------------------------------------------


class Open(_Message, frozen=True, kw_only=True, tag="open"):
    """Load one replica of an engine of `graph` (MessagePack). Answered by `Ready` or `Unfit`.

    `num_blocks`: the size of its pool in an earlier life, if there was one. `block_key`: the key
    with which all engines of the graph hash prefix blocks.
    """

    graph: bytes
    engine: str
    replica: int
    block_key: bytes
    num_blocks: int | None = None


class Submit(_Message, frozen=True, kw_only=True, tag="submit"):
    """Start a sequence. Answered by `Done` or `Refused`."""

    call: int
    state: SequenceState


class Cancel(_Message, frozen=True, kw_only=True, tag="cancel"):
    """Cancel a sequence, as the engine port says. Not answered."""

    request_id: str
    choice: int
    epoch: int


class Import(_Message, frozen=True, kw_only=True, tag="import"):
    """Reserve blocks for a transfer.

    The answers come in order of arrival: `BlocksReserved` or `Refused`.
    """

    call: int
    offer: LeaseOffer


class Export(_Message, frozen=True, kw_only=True, tag="export"):
    """Begin to send a held lease, without the first blocks that the receiver has already. Answered
    by `Exported` or `Refused`.
    """

    call: int
    lease: LeaseRef
    num_received: int = 0


class ExportChunk(_Message, frozen=True, kw_only=True, tag="export_chunk"):
    """Offer computed blocks of a prompt that is still being computed. Answered by `Exported` or
    `Refused`.
    """

    call: int
    lease: LeaseRef
    chunk: KVChunk


class Receive(_Message, frozen=True, kw_only=True, tag="receive"):
    """Copy `source` into a reserved lease, after the first blocks that are there already. The lease
    is filled then. Answered by `Done` or `Refused`.
    """

    call: int
    lease: LeaseRef
    source: BlockLocation
    num_received: int = 0


class ReceiveChunk(_Message, frozen=True, kw_only=True, tag="receive_chunk"):
    """Copy `source` into a reserved lease while the prompt is still being computed; more blocks
    follow. Answered by `Done` or `Refused`.
    """

    call: int
    lease: LeaseRef
    source: BlockLocation
    chunk: KVChunk


class Release(_Message, frozen=True, kw_only=True, tag="release"):
    """Free the blocks of an exported lease: the receiver has acknowledged them, or given up."""

    lease: LeaseRef


class RenewLease(_Message, frozen=True, kw_only=True, tag="renew_lease"):
    """Keep the blocks of an exported lease: the receiver still copies them."""

    lease: LeaseRef


class Drop(_Message, frozen=True, kw_only=True, tag="drop"):
    """No caller waits for that call any more. The worker still answers the call."""

    call: int


class Grant(_Message, frozen=True, kw_only=True, tag="grant"):
    """Allow one more batch of events: the reader of `owner` took one."""

    owner: str


class SyncCache(_Message, frozen=True, kw_only=True, tag="sync_cache"):
    """Report all cached prefix blocks, and then their changes, by `CacheUpdate`."""


class GrantCacheUpdate(_Message, frozen=True, kw_only=True, tag="grant_cache_update"):
    """Allow one more `CacheUpdate`: one was read."""


class Idle(_Message, frozen=True, kw_only=True, tag="idle"):
    """Wait until no step computes. Answered by `Done`."""

    call: int


class Ping(_Message, frozen=True, kw_only=True, tag="ping"):
    """Ask for a sign of life. Answered by `Pong`."""


class Stop(_Message, frozen=True, kw_only=True, tag="stop"):
    """End the engine, and the process."""


# ---- sent by the worker --------------------------------------------------------------------


class Ready(_Message, frozen=True, kw_only=True, tag="ready"):
    """The engine is open."""

    facts: EngineFacts


class Starting(_Message, frozen=True, kw_only=True, tag="starting"):
    """Progress of the engine's start; sent before `Ready`."""

    event: ProgressEvent


class Unfit(_Message, frozen=True, kw_only=True, tag="unfit"):
    """The engine cannot be opened. `error`: a fault of options, model or memory, safe to show."""

    error: str


class Done(_Message, frozen=True, kw_only=True, tag="done"):
    """The call has returned."""

    call: int


class Refused(_Message, frozen=True, kw_only=True, tag="refused"):
    """The call raised EngineRefusal, StaleLease or DamagedBlocks, by `kind`."""

    call: int
    kind: Literal["refusal", "stale", "damaged"]
    error: str
    code: str = ""


class BlocksReserved(_Message, frozen=True, kw_only=True, tag="blocks_reserved"):
    """Blocks are reserved under `lease`."""

    call: int
    lease: LeaseRef


class Exported(_Message, frozen=True, kw_only=True, tag="exported"):
    """The location of exported blocks."""

    call: int
    source: BlockLocation


class KVProgress(_Message, frozen=True, kw_only=True, tag="kv_progress"):
    """`num_blocks` of a prompt that is to be exported are computed, and will not change."""

    lease: LeaseRef
    num_blocks: int


class Events(_Message, frozen=True, kw_only=True, tag="events"):
    """The events of one step, of the sequences of `owner`. Uses up one grant."""

    owner: str
    events: tuple[TokenEvent | PrefillDone, ...]
    load: EngineLoad


class CacheUpdate(_Message, frozen=True, kw_only=True, tag="cache_update"):
    """Stored and dropped prefix blocks, with the fields of `CacheChanged`. Uses up one grant."""

    sequence: int
    is_first: bool
    stored: bytes
    dropped: bytes


class Pong(_Message, frozen=True, kw_only=True, tag="pong"):
    """A sign of life, with the state of the engine.

    `step_tokens`: a histogram of steps by their number of tokens. `num_step_tokens`: the tokens of
    all steps.
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
