"""The engine port: how operators and executors use an engine of any kind."""

import math
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Literal, Protocol, TypeAlias, TypeGuard, runtime_checkable

import msgspec

from sagellm.graphs.vocabulary import KV_TRANSFER
from sagellm.runtime.containers import Buckets
from sagellm.runtime.lease_shape import LeaseShape
from sagellm.runtime.messages import ChoiceKey, LeaseRef, SequenceState, TokenEvent


class EngineRefusal(ValueError):
    """An engine cannot serve a sequence; the message says why and is safe to show.

    `code`: a key of CODES; empty where neither the request nor the moment is at fault.
    """

    def __init__(self, message: str, code: str = "bad_request") -> None:
        super().__init__(message)
        self.code = code


class StaleLease(LookupError):
    """A lease is gone, or its fence (request, epoch) names another request."""


class DamagedBlocks(RuntimeError):
    """Blocks arrived damaged several times, or did not arrive in time."""


# Why an engine lost a question: its process died, perhaps of the question; its link ended; or
# neither: the engine was sent away, or was gone before.
LossCause: TypeAlias = Literal["death", "link", "none"]


class EngineLost(ConnectionError):
    """The process of an engine replica is gone with everything it held; another replaces it.

    `cause`: of the question that was lost; "none" where the engine was gone before.
    """

    def __init__(self, name: str, replica: int, *, cause: LossCause = "none") -> None:
        super().__init__(f"replica {replica} of engine {name} is gone")
        self.cause: LossCause = cause


class PrefillDone(msgspec.Struct, frozen=True, kw_only=True, tag="prefill_done"):
    """A `hold_kv` sequence has its first token; its blocks wait under `lease` for an export.

    The owner must `export` the lease and release it, or `cancel` the sequence. If the first token
    was the last (`first.is_last`), the lease is None and the blocks are free already.
    """

    first: TokenEvent
    lease: LeaseRef | None


class Lost(msgspec.Struct, frozen=True, kw_only=True, tag="lost"):
    """The engine is gone, and this sequence with it; no more events follow.

    All emitted tokens came before this event, so that the sequence can be submitted again
    elsewhere.
    """

    request_id: str
    choice: int
    epoch: int
    cause: LossCause

    @property
    def key(self) -> ChoiceKey:
        return self.request_id, self.choice


EngineEvent: TypeAlias = TokenEvent | PrefillDone | Lost


class LeaseOffer(msgspec.Struct, frozen=True, kw_only=True, tag="offer"):
    """A request to a pool to reserve blocks for a sequence that another pool will fill."""

    request_id: str
    choice: int
    epoch: int
    num_tokens: int  # whose KV will arrive
    layout_hash: str  # of the sender's KV groups and blocks: equal in both pools


@dataclass(frozen=True, slots=True)
class EngineFacts:
    """What checks and operators may know of an engine without touching it.

    `capabilities`: of CAPABILITIES (`graphs/vocabulary.py`). An engine that manages its own memory
    has no blocks, and takes `max_num_seqs` sequences at a time. `lease_shape`: how many blocks a
    sequence takes; None for one block per `block_size` tokens.
    """

    model: str
    max_model_len: int
    max_num_seqs: int
    capabilities: frozenset[str] = field(default_factory=frozenset)
    model_hash: str = ""  # of config and dtype: equal for prefill and decode
    block_size: int = 1
    num_blocks: int = 0
    kv_block_bytes: int = 0
    layout_hash: str = ""  # of the KV layout: equal in pools that exchange blocks
    lease_shape: LeaseShape | None = None

    @property
    def shape(self) -> LeaseShape:
        return self.lease_shape or LeaseShape(self.block_size)

    @property
    def num_token_blocks(self) -> float:
        """How many times `block_size` tokens of long sequences fit into the pool.

        Infinite without blocks, and where long sequences take no more blocks than short ones.
        """
        per_block = self.shape.num_blocks_per_block if self.num_blocks else 0
        return self.num_blocks // per_block if per_block else math.inf


@dataclass(frozen=True, slots=True)
class DraftCounts:
    """Counts of speculative decoding since the start; zero without speculation.

    `accepted_at[i]`: drafts whose token i and all tokens before it were accepted.
    """

    num_drafts: int = 0
    num_draft_tokens: int = 0
    accepted_at: tuple[int, ...] = ()

    @property
    def num_accepted_tokens(self) -> int:
        return sum(self.accepted_at)


NO_DRAFTS = DraftCounts()


@dataclass(frozen=True, slots=True)
class EngineLoad:
    """A snapshot of an engine for routing and metrics.

    Blocks are free, cached (kept for a shared prefix, and freed where blocks run out) or leased.
    `num_prefix_queries` and `num_prefix_hits`: tokens of sequences when they first got blocks, and
    those of them that were cached.
    """

    num_running: int = 0
    num_waiting: int = 0
    num_pending_prefill_tokens: int = 0
    num_free_blocks: int = 0
    num_cached_blocks: int = 0
    num_leased_blocks: int = 0
    num_blocks: int = 0
    peak_leased_blocks: int = 0
    num_preemptions: int = 0
    num_steps: int = 0
    num_prefix_queries: int = 0
    num_prefix_hits: int = 0
    num_evicted_blocks: int = 0
    num_damaged_chunks: int = 0  # of blocks from other workers; asked for again
    num_early_blocks: int = 0  # from other workers, before their whole prompt was computed
    drafts: DraftCounts = NO_DRAFTS


@dataclass(frozen=True, slots=True)
class EngineHealth:
    """Whether an engine makes progress.

    `step_p99_s` is None before the first step has ended. `is_hung`: sequences run or wait, and
    nothing has moved for long.
    """

    busy_for_s: float = 0.0  # time of the running step; 0 where none runs
    step_p99_s: float | None = None
    num_steps: int = 0
    is_hung: bool = False


@runtime_checkable
class CountingSteps(Protocol):
    """An engine that counts the tokens of its steps."""

    @property
    def step_tokens(self) -> Buckets: ...


class KVSource(Protocol):
    """The sending side of a transfer; its lease is `sending` until released."""

    @property
    def lease(self) -> LeaseRef: ...

    def release(self) -> None:
        """Free the blocks: the receiver has acknowledged, or the transfer was given up."""


class KVTarget(Protocol):
    """The receiving side of a transfer; its blocks are `reserved`, `receiving`, then `filled`."""

    @property
    def lease(self) -> LeaseRef: ...

    async def receive(self, source: KVSource) -> None:
        """Copy all blocks, with a checkpoint after each chunk; then the lease is `filled`.

        Raises StaleLease where either lease is gone, EngineLost, DamagedBlocks. Cancellation aborts
        the lease.
        """

    def abort(self) -> None:
        """Free the blocks, unless a sequence has adopted the lease."""


class Engine(Protocol):
    """One replica of an engine of any kind. All methods are called from the trio thread.

    The executor starts `run` in the nursery of the graph. No block of a sequence is freed before
    the last step that may write to the block is over; `idle` waits for that.
    """

    facts: EngineFacts

    async def submit(self, state: SequenceState) -> None:
        """Queue a sequence. Raises EngineRefusal, StaleLease, EngineLost.

        After an error the engine holds nothing of the sequence.
        """

    def cancel(self, request_id: str, choice: int, epoch: int) -> None:
        """End a sequence, or free the lease that is held, reserved or received for it.

        An unknown sequence, or one of another epoch, is ignored. A submitted sequence ends with
        exactly one event with finish reason "cancelled". A sequence after its `PrefillDone` gives
        no further event.
        """

    def events(self, owner: str) -> AsyncIterator[tuple[EngineEvent, ...]]:
        """Events of the sequences of `owner`, one batch a step, until the engine stops."""

    @property
    def load(self) -> EngineLoad: ...

    @property
    def health(self) -> EngineHealth: ...

    async def idle(self) -> None:
        """Wait until no step computes: a step may still use blocks of sequences that have ended."""

    async def run(self) -> None:
        """Step until cancelled; the executor starts `run` in the nursery of the graph."""


class KVEngine(Engine, Protocol):
    """An engine with the capability `kv_transfer`: its KV blocks can move to another pool.

    A sequence submitted with `hold_kv` ends with `PrefillDone`; its lease then waits for `export`.
    """

    def export(self, lease: LeaseRef) -> KVSource:
        """Turn a held `filled` lease to `sending`. Raises StaleLease."""

    async def import_(self, offer: LeaseOffer) -> KVTarget:
        """Reserve blocks, waiting in order of arrival until there are enough.

        A repeated offer of the same (request, choice, epoch) returns the same target. Raises
        EngineRefusal where the layouts differ or the whole pool is too small, EngineLost.
        """


def moves_kv(engine: Engine) -> TypeGuard[KVEngine]:
    """Whether the KV blocks of an engine can move to and from other engines."""
    return has_kv_transfer(engine.facts)


def has_kv_transfer(facts: EngineFacts) -> bool:
    """Whether an engine with these facts is a KVEngine."""
    return KV_TRANSFER in facts.capabilities


def kv_engine(engine: Engine) -> KVEngine:
    """The engine itself, as a KVEngine.

    Raises TypeError where its KV blocks cannot move; the check of a graph excludes that for every
    operator that needs `kv_transfer`.
    """
    if not moves_kv(engine):
        raise TypeError(f"the engine of model {engine.facts.model!r} cannot move KV blocks")
    return engine
