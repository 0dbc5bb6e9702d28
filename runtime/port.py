"""The engine port: what operators and executors use any engine through."""

import math
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Literal, Protocol, TypeAlias, TypeGuard, runtime_checkable

import msgspec

from sagellm.graphs.vocabulary import KV_TRANSFER
from sagellm.runtime.histograms import Buckets
from sagellm.runtime.lease_shape import LeaseShape
from sagellm.runtime.messages import LeaseRef, SequenceState, TokenEvent


class EngineRefusal(ValueError):
    """A sequence that this engine cannot serve; the message says why and is safe to show.

    `code`: a key of CODES, or nothing where neither the request nor the moment is at fault.
    """

    def __init__(self, message: str, code: str = "bad_request") -> None:
        super().__init__(message)
        self.code = code


class StaleLease(LookupError):
    """A lease that is gone, or whose fence (request, epoch) names another request."""


class DamagedBlocks(RuntimeError):
    """Blocks that came other than they were sent, again and again, or did not come in time."""


# Why an engine lost what it was asked: its process died, perhaps of it; the link to it ended; or
# none of these: it was sent away, or was never there.
LossCause: TypeAlias = Literal["death", "link", "none"]


class EngineLost(ConnectionError):
    """The process of an engine replica is gone, with all that it held; another takes its place.

    `cause`: of the question that it was asked; "none" where it was gone before.
    """

    def __init__(self, name: str, replica: int, *, cause: LossCause = "none") -> None:
        super().__init__(f"replica {replica} of engine {name} is gone")
        self.cause: LossCause = cause


class PrefillDone(msgspec.Struct, frozen=True, kw_only=True, tag="prefill_done"):
    """A `hold_kv` sequence has its first token; its blocks wait under `lease` for an export.

    The owner must `export` the lease and release it, or `cancel` the sequence. Where the first
    token was the last (`first.is_last`), the lease is None and the blocks are already free.
    """

    first: TokenEvent
    lease: LeaseRef | None


class Lost(msgspec.Struct, frozen=True, kw_only=True, tag="lost"):
    """The engine is gone, and this sequence with it: no more events come. What it emitted came
    before this event, so whoever has that can submit the sequence again, anywhere.
    """

    request_id: str
    choice: int
    epoch: int
    cause: LossCause

    @property
    def key(self) -> tuple[str, int]:
        return self.request_id, self.choice


EngineEvent: TypeAlias = TokenEvent | PrefillDone | Lost


class LeaseOffer(msgspec.Struct, frozen=True, kw_only=True, tag="offer"):
    """Asks a pool to reserve blocks for a sequence that another pool will fill."""

    request_id: str
    choice: int
    epoch: int
    num_tokens: int  # of KV that will arrive
    layout_hash: str  # of the sender's KV groups and blocks: both pools must agree


@dataclass(frozen=True, slots=True)
class EngineFacts:
    """What a graph's checks and operators may know of an engine without touching it.

    `capabilities`: of CAPABILITIES (`graphs/vocabulary.py`). An engine that manages its memory
    itself has no blocks, and takes `max_num_seqs` sequences at a time.
    `lease_shape`: how many of its blocks a sequence takes; None: one for `block_size` tokens.
    """

    model: str
    max_model_len: int
    max_num_seqs: int
    capabilities: frozenset[str] = field(default_factory=frozenset)
    model_hash: str = ""  # of config and dtype: prefill and decode must agree
    block_size: int = 1
    num_blocks: int = 0
    kv_block_bytes: int = 0
    layout_hash: str = ""  # of the KV layout: pools that exchange blocks must agree
    lease_shape: LeaseShape | None = None

    @property
    def shape(self) -> LeaseShape:
        return self.lease_shape or LeaseShape(self.block_size)

    @property
    def num_token_blocks(self) -> float:
        """How many times `block_size` tokens the pool holds of long sequences; infinite where they
        take no more blocks than short ones, or there are none.
        """
        per_block = self.shape.num_blocks_per_block if self.num_blocks else 0
        return self.num_blocks // per_block if per_block else math.inf


@dataclass(frozen=True, slots=True)
class DraftCounts:
    """Speculation since the start; empty where an engine does not speculate.

    `accepted_at[i]`: drafts whose token i was right, with all before it.
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
    """A snapshot for routing and metrics.

    Blocks are free, cached (kept for a prefix that may be met again, and free where blocks run out)
    or leased. `num_prefix_queries`, `num_prefix_hits`: tokens of sequences when they first got
    blocks, and how many of them needed not be computed.
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
    num_damaged_chunks: int = 0  # of blocks from other workers, that were asked for again
    num_early_blocks: int = 0  # from other workers, while the rest of their prompt was computed
    drafts: DraftCounts = NO_DRAFTS


@dataclass(frozen=True, slots=True)
class EngineHealth:
    """Whether an engine makes progress. `step_p99_s` is None before its first step has ended.

    `is_hung`: it has work, be it computed or only waiting, and for long nothing has moved.
    """

    busy_for_s: float = 0.0  # what the running step has taken; 0 where none runs
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
        """The receiver has acknowledged, or the transfer was given up: free the blocks."""


class KVTarget(Protocol):
    """The receiving side: blocks `reserved`, then `receiving`, then `filled`."""

    @property
    def lease(self) -> LeaseRef: ...

    async def receive(self, source: KVSource) -> None:
        """Copy all blocks, a checkpoint a chunk; afterwards the lease is `filled`.

        Raises StaleLease where either lease has gone, EngineLost, DamagedBlocks. Cancelled midway,
        the lease is aborted.
        """

    def abort(self) -> None:
        """Give the blocks back; nothing happens where a sequence has adopted the lease."""


class Engine(Protocol):
    """One replica of an engine, of any kind. All methods are called from the trio thread.

    `run` and `idle` are what the shell of a graph needs: it runs every engine in its own nursery,
    and no block of a sequence is free before the step that may still write it is over.
    """

    facts: EngineFacts

    async def submit(self, state: SequenceState) -> None:
        """Queue a sequence. Raises EngineRefusal, StaleLease, EngineLost; then it holds nothing."""

    def cancel(self, request_id: str, choice: int, epoch: int) -> None:
        """End a sequence, or free the lease held, reserved or received for it.

        An unknown one, or one of another epoch, is ignored. A submitted sequence ends with exactly
        one event with finish reason "cancelled"; one whose `PrefillDone` was already emitted gives
        no further event.
        """

    def events(self, owner: str) -> AsyncIterator[tuple[EngineEvent, ...]]:
        """What happened to the sequences of `owner`, one batch a step, until the engine stops."""

    @property
    def load(self) -> EngineLoad: ...

    @property
    def health(self) -> EngineHealth: ...

    async def idle(self) -> None:
        """Wait until no step computes: one may hold blocks of sequences that have ended already."""

    async def run(self) -> None:
        """Step until cancelled; the executor starts it in the graph's nursery."""


class KVEngine(Engine, Protocol):
    """An engine with the capability `kv_transfer`: its KV blocks can move to another engine's pool.

    A sequence submitted with `hold_kv` ends with `PrefillDone`, and its lease waits for `export`.
    """

    def export(self, lease: LeaseRef) -> KVSource:
        """Turn a held `filled` lease to `sending`. Raises StaleLease."""

    async def import_(self, offer: LeaseOffer) -> KVTarget:
        """Reserve blocks, waiting in order of arrival until there are enough.

        Asked again for the same (request, choice, epoch), it returns the same target. Raises
        EngineRefusal where the layouts differ or the pool is too small at all, EngineLost.
        """


def moves_kv(engine: Engine) -> TypeGuard[KVEngine]:
    """Whether its KV blocks can move to, and come from, another engine."""
    return has_kv_transfer(engine.facts)


def has_kv_transfer(facts: EngineFacts) -> bool:
    """Whether an engine with those facts is a KVEngine."""
    return KV_TRANSFER in facts.capabilities


def kv_engine(engine: Engine) -> KVEngine:
    """The engine itself. Raises TypeError where its KV blocks cannot move, which the check of a
    graph has excluded for every operator that needs `kv_transfer`.
    """
    if not moves_kv(engine):
        raise TypeError(f"the engine of model {engine.facts.model!r} cannot move KV blocks")
    return engine
