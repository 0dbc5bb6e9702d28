"""The engine port: how operators and executors use an engine of any kind."""

import math
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Literal, Protocol, TypeAlias, TypeGuard, runtime_checkable

import msgspec

from sagellm.graphs.vocabulary import KV_TRANSFER
from sagellm.runtime.containers import Buckets
from sagellm.runtime.lease_shape import LeaseShape
from sagellm.runtime.messages import ChoiceKey, LeaseRef, SequenceState, TokenEvent


class EngineRefusal(ValueError):
    """An engine cannot serve a sequence. The message gives the reason, and clients may see it.

    `code`: a key of CODES, or empty if no code fits.
    """

    def __init__(self, message: str, code: str = "bad_request") -> None:
        super().__init__(message)
        self.code = code


class StaleLease(LookupError):
    """A lease is gone, or its fence (request, choice, epoch) names another request."""


class DamagedBlocks(RuntimeError):
    """Blocks arrived damaged several times, or did not arrive in time."""


# Why an engine lost a sequence or call. "death": its process died, perhaps because of this request.
# "link": the link to its process ended. "none": the engine was stopped on purpose, or was gone
# before the sequence or the call reached it.
LossCause: TypeAlias = Literal["death", "link", "none"]


class EngineLost(ConnectionError):
    """The process of an engine replica is gone, with all its sequences; a new process replaces it.

    `cause`: why the call was lost.
    """

    def __init__(self, name: str, replica: int, *, cause: LossCause = "none") -> None:
        super().__init__(f"replica {replica} of engine {name} is gone")
        self.cause: LossCause = cause


class PrefillDone(msgspec.Struct, frozen=True, kw_only=True, tag="prefill_done"):
    """A sequence with `hold_kv` has its first token; its blocks wait under `lease` for an export.

    The owner must `export` the lease and release it, or `cancel` the sequence. If the first token
    was the last (`first.is_last`), `lease` is None and the blocks are free already.
    """

    first: TokenEvent
    lease: LeaseRef | None


class Lost(msgspec.Struct, frozen=True, kw_only=True, tag="lost"):
    """The engine was lost with this sequence; no more events of the sequence follow.

    All its tokens came before this event, so another engine can resume after them.
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
    num_tokens: int  # tokens whose KV will arrive
    layout_hash: str  # the hash of the sender's KV layout; must equal the receiver's


@dataclass(frozen=True, slots=True)
class EngineFacts:
    """Constant properties of an engine, for graph checks and operators.

    `capabilities`: a subset of CAPABILITIES (`graphs/vocabulary.py`). `num_blocks` is 0 for an
    engine that manages its own memory; such an engine takes `max_num_seqs` sequences at a time.
    `lease_shape`: how many blocks a sequence takes; None: one block per `block_size` tokens.
    `vector_len`: numbers of the vector of a text; 0 for an engine that does not embed.
    """

    model: str
    max_model_len: int
    max_num_seqs: int
    capabilities: frozenset[str] = field(default_factory=frozenset)
    model_hash: str = ""  # hash of config and dtype: equal for prefill and decode
    block_size: int = 1
    num_blocks: int = 0
    kv_block_bytes: int = 0
    layout_hash: str = ""  # hash of the KV layout: equal in pools that exchange blocks
    lease_shape: LeaseShape | None = None
    vector_len: int = 0

    @property
    def shape(self) -> LeaseShape:
        """`lease_shape`, or its default."""
        return self.lease_shape or LeaseShape(self.block_size)

    @property
    def num_token_blocks(self) -> float:
        """The capacity of the pool for long sequences, in units of `block_size` tokens.

        Infinite for an engine without blocks, and if long sequences take no more blocks than short
        sequences (all layers have a window or a recurrent state).
        """
        per_block = self.shape.num_blocks_per_block if self.num_blocks else 0
        return self.num_blocks // per_block if per_block else math.inf


@dataclass(frozen=True, slots=True)
class DraftCounts:
    """Counts of speculative decoding since the engine started; zero without speculation.

    `accepted_at[i]`: the number of drafts whose tokens 0 ... i were all accepted.
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
    """A snapshot of the load and counters of an engine, for routing and metrics.

    A block is free, cached (holds a prefix, and is evicted when free blocks run out) or leased.
    `num_prefix_queries`: tokens that were looked up in the prefix cache. `num_prefix_hits`: the
    cached part of these tokens. Each sequence counts once, when it first gets blocks.
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
    num_damaged_chunks: int = 0  # chunks from other workers that came damaged and were resent
    num_early_blocks: int = 0  # blocks from other workers that came before their prefill ended
    drafts: DraftCounts = NO_DRAFTS


@dataclass(frozen=True, slots=True)
class EngineHealth:
    """Whether an engine makes progress.

    `step_p99_s`: the 99th percentile of step times, in seconds; None before the first step has
    ended. `is_hung`: the engine has sequences, but has made no progress for a long time.
    """

    busy_for_s: float = 0.0  # how long the current step has run; 0 between steps
    step_p99_s: float | None = None
    num_steps: int = 0
    is_hung: bool = False


@runtime_checkable
class CountingSteps(Protocol):
    """An engine with a histogram of tokens per step."""

    @property
    def step_tokens(self) -> Buckets: ...


@runtime_checkable
class ReportsAvailability(Protocol):
    """An engine that goes down and comes up by itself, such as one behind a server elsewhere."""

    def report_availability(self, report: Callable[[bool], None]) -> None:
        """Call `report` with False when the engine goes down, and with True when it is up again."""


class KVSource(Protocol):
    """The sending side of a KV transfer; its lease is in state `sending` until `release`."""

    @property
    def lease(self) -> LeaseRef: ...

    def release(self) -> None:
        """Free the blocks, after the receiver has acknowledged them or the transfer has failed."""


class KVTarget(Protocol):
    """The receiving side of a KV transfer; its lease is `reserved`, `receiving`, then `filled`."""

    @property
    def lease(self) -> LeaseRef: ...

    async def receive(self, source: KVSource) -> None:
        """Copy all blocks, with a checkpoint after each chunk; then the lease is `filled`.

        Raises StaleLease if either lease is gone, EngineLost, DamagedBlocks. Cancellation aborts
        the lease.
        """

    def abort(self) -> None:
        """Free the blocks, unless a sequence has adopted the lease."""


class Engine(Protocol):
    """One replica of an engine of any kind. All methods are called from the trio thread.

    With async scheduling, a step may still write to blocks of a sequence that has ended: an engine
    frees these blocks only after that step. `idle` waits for it.
    """

    facts: EngineFacts

    async def submit(self, state: SequenceState) -> None:
        """Queue a sequence. Raises EngineRefusal, StaleLease, EngineLost.

        After an error the engine holds nothing of the sequence.
        """

    def cancel(self, request_id: str, choice: int, epoch: int) -> None:
        """End a sequence, or free the lease that is held, reserved or received for it.

        Does nothing if no sequence has this id, choice and epoch. A running or waiting sequence
        ends with exactly one event, with finish reason "cancelled". After `PrefillDone`, the lease
        is freed and no event follows.
        """

    def events(self, owner: str) -> AsyncIterator[tuple[EngineEvent, ...]]:
        """The events of the sequences of `owner`, in one batch per step, until the engine stops."""

    @property
    def load(self) -> EngineLoad: ...

    @property
    def health(self) -> EngineHealth: ...

    async def idle(self) -> None:
        """Wait until no step runs: a step may still use blocks of sequences that have ended."""

    async def run(self) -> None:
        """Step until cancelled; the executor starts `run` in the nursery of the graph."""


class KVEngine(Engine, Protocol):
    """An engine with the capability `kv_transfer`: its KV blocks can move to another pool.

    A sequence submitted with `hold_kv` ends with `PrefillDone`; its lease then waits for `export`.
    """

    def export(self, lease: LeaseRef) -> KVSource:
        """Change the state of a held lease from `filled` to `sending`. Raises StaleLease."""

    async def import_(self, offer: LeaseOffer) -> KVTarget:
        """Reserve blocks. Waits, in order of arrival, until enough blocks are free.

        A repeated offer of the same (request, choice, epoch) returns the same target. Raises
        EngineRefusal if the layouts differ or the whole pool is too small, EngineLost.
        """


def moves_kv(engine: Engine) -> TypeGuard[KVEngine]:
    """Whether the KV blocks of an engine can move to and from other engines."""
    return has_kv_transfer(engine.facts)


def has_kv_transfer(facts: EngineFacts) -> bool:
    """Whether an engine with these facts is a KVEngine."""
    return KV_TRANSFER in facts.capabilities


def kv_engine(engine: Engine) -> KVEngine:
    """The engine, typed as a KVEngine. Raises TypeError if its KV blocks cannot move.

    An operator whose spec needs `kv_transfer` never meets the error: graph checks refuse other
    engines for it.
    """
    if not moves_kv(engine):
        raise TypeError(f"the engine of model {engine.facts.model!r} cannot move KV blocks")
    return engine
