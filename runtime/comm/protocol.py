"""The messages between a graph and the worker of one engine replica.

The graph sends calls and notices. Each call has a number `call`, which its answer repeats. The
worker sends answers, events and its own state. All times are on the graph's clock: a worker gets
the offset of this clock when it starts.
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
    """The base of all messages. A message with an unknown field is not decoded."""


# ---- sent by the graph ---------------------------------------------------------------------


class Open(_Message, frozen=True, kw_only=True, tag="open"):
    """Load one replica of an engine of `graph` (MessagePack). Answered by `Ready` or `Unfit`.

    `num_blocks`: the number of KV blocks that the engine must have, as in an earlier life; None:
    the worker chooses. `block_key`: the key with which all engines of the graph hash prefix blocks.
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
    """Cancel a sequence; see `Engine` in `runtime/port.py`. Not answered."""

    request_id: str
    choice: int
    epoch: int


class Import(_Message, frozen=True, kw_only=True, tag="import"):
    """Reserve blocks for a transfer. Answered by `BlocksReserved` or `Refused`, in the order in
    which these calls arrived.
    """

    call: int
    offer: LeaseOffer


class Export(_Message, frozen=True, kw_only=True, tag="export"):
    """Offer the blocks of a held lease to a receiver, without the first `num_received` blocks: the
    receiver has them already. Answered by `Exported` or `Refused`.
    """

    call: int
    lease: LeaseRef
    num_received: int = 0


class ExportChunk(_Message, frozen=True, kw_only=True, tag="export_chunk"):
    """Offer the blocks `chunk`, which are computed, of a prompt that is still being computed.
    Answered by `Exported` or `Refused`.
    """

    call: int
    lease: LeaseRef
    chunk: KVChunk


class Receive(_Message, frozen=True, kw_only=True, tag="receive"):
    """Copy the blocks at `source` into a reserved lease, after its first `num_received` blocks,
    which have arrived already. The lease is then filled. Answered by `Done` or `Refused`.
    """

    call: int
    lease: LeaseRef
    source: BlockLocation
    num_received: int = 0


class ReceiveChunk(_Message, frozen=True, kw_only=True, tag="receive_chunk"):
    """Copy the blocks at `source` into a reserved lease while the prompt is still being computed.
    More blocks follow. Answered by `Done` or `Refused`.
    """

    call: int
    lease: LeaseRef
    source: BlockLocation
    chunk: KVChunk


class Release(_Message, frozen=True, kw_only=True, tag="release"):
    """Free the blocks of an exported lease: the receiver has all of them, or has given up."""

    lease: LeaseRef


class RenewLease(_Message, frozen=True, kw_only=True, tag="renew_lease"):
    """Keep the blocks of an exported lease for longer: the receiver is still copying them."""

    lease: LeaseRef


class Drop(_Message, frozen=True, kw_only=True, tag="drop"):
    """No caller waits for the call `call` any more. The worker still answers the call."""

    call: int


class Grant(_Message, frozen=True, kw_only=True, tag="grant"):
    """Allow one more `Events` message for the operator `owner`, which has read one."""

    owner: str


class SyncCache(_Message, frozen=True, kw_only=True, tag="sync_cache"):
    """Report all cached prefix blocks, and from then on all changes, by `CacheUpdate`."""


class GrantCacheUpdate(_Message, frozen=True, kw_only=True, tag="grant_cache_update"):
    """Allow one more `CacheUpdate`, because the graph has read one."""


class Idle(_Message, frozen=True, kw_only=True, tag="idle"):
    """Wait until no step computes. Answered by `Done`."""

    call: int


class Ping(_Message, frozen=True, kw_only=True, tag="ping"):
    """Ask for a sign of life. Answered by `Pong`."""


class Stop(_Message, frozen=True, kw_only=True, tag="stop"):
    """End the engine and the worker process."""


# ---- sent by the worker --------------------------------------------------------------------


class Ready(_Message, frozen=True, kw_only=True, tag="ready"):
    """The answer to `Open`: the engine is open."""

    facts: EngineFacts


class Starting(_Message, frozen=True, kw_only=True, tag="starting"):
    """Progress of the engine's start; sent before `Ready`."""

    event: ProgressEvent


class Unfit(_Message, frozen=True, kw_only=True, tag="unfit"):
    """The answer to `Open`: the engine cannot be opened. `error`: the cause, in options, model or
    memory; it is safe to show.
    """

    error: str


class Done(_Message, frozen=True, kw_only=True, tag="done"):
    """The call has returned."""

    call: int


class Refused(_Message, frozen=True, kw_only=True, tag="refused"):
    """The call raised an error: EngineRefusal, StaleLease or DamagedBlocks, as `kind` tells."""

    call: int
    kind: Literal["refusal", "stale", "damaged"]
    error: str
    code: str = ""


class BlocksReserved(_Message, frozen=True, kw_only=True, tag="blocks_reserved"):
    """The answer to `Import`: blocks are reserved under `lease`."""

    call: int
    lease: LeaseRef


class Exported(_Message, frozen=True, kw_only=True, tag="exported"):
    """The answer to `Export` and `ExportChunk`: the location of the blocks."""

    call: int
    source: BlockLocation


class KVProgress(_Message, frozen=True, kw_only=True, tag="kv_progress"):
    """The first `num_blocks` blocks of a prompt that is to be exported are computed, and will not
    change.
    """

    lease: LeaseRef
    num_blocks: int


class Events(_Message, frozen=True, kw_only=True, tag="events"):
    """The events of one step, for the sequences of operator `owner`. Uses up one `Grant`."""

    owner: str
    events: tuple[TokenEvent | PrefillDone, ...]
    load: EngineLoad


class CacheUpdate(_Message, frozen=True, kw_only=True, tag="cache_update"):
    """Stored and dropped prefix blocks, with the fields of `CacheChanged`. Uses up one
    `GrantCacheUpdate`.
    """

    sequence: int
    is_first: bool
    stored: bytes
    dropped: bytes


class Pong(_Message, frozen=True, kw_only=True, tag="pong"):
    """A sign of life, with the state of the engine.

    `step_tokens`: a histogram of engine steps by number of tokens. `num_step_tokens`: the number of
    tokens of all steps.
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
