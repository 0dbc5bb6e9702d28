"""The operator protocol: what an operator is given, and what it may answer."""

import hashlib
import math
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import (
    Any,
    Generic,
    Literal,
    Protocol,
    TypeAlias,
    TypeVar,
    runtime_checkable,
)

import msgspec

from sagellm.graphs.vocabulary import OpSpec
from sagellm.runtime.feedback import Feedback, PrefixesChanged, Topology
from sagellm.runtime.messages import Forked, Item, Request, TokenEvent
from sagellm.runtime.port import Engine, EngineEvent, EngineFacts
from sagellm.runtime.prefixes import Hasher, new_hasher


class Credit(msgspec.Struct, frozen=True, array_like=True):
    """What may be under way towards one replica: requests, prompt tokens, KV blocks."""

    requests: float = math.inf
    tokens: float = math.inf
    blocks: float = math.inf

    def __add__(self, other: "Credit") -> "Credit":
        return Credit(
            self.requests + other.requests, self.tokens + other.tokens, self.blocks + other.blocks
        )

    def __sub__(self, other: "Credit") -> "Credit":
        return Credit(
            self.requests - other.requests, self.tokens - other.tokens, self.blocks - other.blocks
        )

    def covers(self, cost: "Credit") -> bool:
        return (
            cost.requests <= self.requests
            and cost.tokens <= self.tokens
            and cost.blocks <= self.blocks
        )


EncodeText: TypeAlias = Callable[
    [str, str], tuple[int, ...]
]  # (text, `Request.model`) -> token ids

# ---- what an operator may meet -------------------------------------------------------------


class Arrival(msgspec.Struct, frozen=True, gc=False):
    """An item at an inlet."""

    item: Item
    inlet: str = "in"


class Signal(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """Overtakes items, goes to every operator, and may come twice.

    `cancel` and `expire` end a request; `forget` says that its last terminal event has passed.
    """

    kind: Literal["cancel", "expire", "forget"]
    request_id: str
    choice: int | None = None  # None: all choices

    def concerns(self, key: tuple[str, int]) -> bool:
        return key[0] == self.request_id and self.choice in (None, key[1])


class OfferTaken(msgspec.Struct, frozen=True, gc=False):
    """An `Offer` of this operator was accepted downstream."""

    item: Item


class Wake(msgspec.Struct, frozen=True, gc=False):
    """The time that the operator asked for by `wake_at` has come."""


Input: TypeAlias = Arrival | Signal | Feedback | PrefixesChanged | Topology | OfferTaken | Wake

# ---- what it may answer --------------------------------------------------------------------


class Emit(msgspec.Struct, frozen=True, gc=False):
    """Send an item. Where there is no credit for it, the whole input is undone and waits."""

    item: Item
    outlet: str = "out"


class EmitAll(msgspec.Struct, frozen=True, gc=False):
    """Send several items in order, as one. An operator that has `on_batch` may answer with it."""

    items: Sequence[Item]
    outlet: str = "out"


class EmitFirst(msgspec.Struct, frozen=True):
    """Send the first of these that downstream has credit for: one item, placed in several ways,
    each with the state that the operator has once that one is sent. They are made as they are
    tried. Where there is credit for none, the whole input is undone and waits.

    `hold_s`: the input also waits where there is credit for others than the first, so long from the
    first time that it was held back.
    """

    choices: Iterable[tuple[Item, Any]]
    outlet: str = "out"
    hold_s: float = 0.0


class Wait(msgspec.Struct, frozen=True, gc=False):
    """The service operator `node`, which an item would go to, has no credit at any replica: the
    whole input is undone and waits.
    """

    node: str


class Offer(msgspec.Struct, frozen=True, gc=False):
    """Send one of these, the first that downstream has credit for, if any; answered by `OfferTaken`.
    A request that is sent is stamped with the time.

    Only an operator that keeps what was not taken (policy_sort) may offer.
    """

    items: tuple[Item, ...]
    outlet: str = "out"


class Terminate(msgspec.Struct, frozen=True):
    """Send the last event of a request over the implicit `terminal` outlet to the sink.

    `cause` is what was raised, if anything was: the log and a caller in this process get it.
    """

    event: TokenEvent
    cause: Exception | None = None


class Announce(msgspec.Struct, frozen=True):
    """Tell the session that a request became several choices; sent before the first of them."""

    forked: Forked


class Report(msgspec.Struct, frozen=True, gc=False):
    """Send feedback upstream."""

    feedback: Feedback


OperatorOutput: TypeAlias = (
    Emit | EmitAll | EmitFirst | Wait | Offer | Terminate | Announce | Report
)

S = TypeVar("S")


class Step(msgspec.Struct, Generic[S], frozen=True):
    """The answer of a logic operator: its next state, what it sends, when to wake it."""

    state: S
    outputs: tuple[OperatorOutput, ...] = ()
    wake_at: float | None = None


class Draw:
    """A random source that is a pure function of (seed, node, number of the input). It is of use
    while that input is answered, and not later.
    """

    __slots__ = ("_node", "_seed", "count", "number")

    def __init__(self, seed: int, node: str, number: int) -> None:
        self._seed = seed
        self._node = node
        self.number = number
        self.count = 0  # of what was drawn for this input

    def random(self) -> float:
        """Uniform in [0, 1)."""
        self.count += 1
        salt = self.count.to_bytes(8, "little")
        key = f"{self._seed}/{self._node}/{self.number}".encode()
        digest = hashlib.blake2b(key, digest_size=8, salt=salt).digest()
        return (int.from_bytes(digest, "little") >> 11) * 2.0**-53

    def below(self, bound: int) -> int:
        """Uniform in 0 ... bound - 1."""
        return int(self.random() * bound)


@dataclass(frozen=True, slots=True)
class Target:
    """A replicated operator downstream, over which a router chooses. `is_next`: requests enter it
    without passing another service operator. `outlets`: those of this operator that lead there.
    """

    node: str
    num_replicas: int
    engine: str = ""
    is_next: bool = False
    outlets: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class Setup:
    """What an operator is built with: its place in the graph, and functions it may call.

    `facts`: of the engines, as far as they are known. `models`: the engines of each model, by its
    key, the default one first; empty where the graph serves one model.
    """

    name: str
    targets: tuple[Target, ...] = ()  # downstream, until the next router
    functions: Mapping[str, Callable[..., Any]] = field(default_factory=dict)
    encode: EncodeText | None = None
    seed: int = 0
    facts: Mapping[str, EngineFacts] = field(default_factory=dict)
    models: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    hasher: Hasher = field(default_factory=new_hasher)


class Logic(Protocol[S]):
    """A pure operator: no I/O, no clock, no task. Equal inputs give equal answers.

    One that also has `on_batch(state, items, now, draw) -> Step` is given the items of one engine
    step at once; it must then answer all of them, and keep none. One that has
    `keeps(state, request_id) -> bool` is told to forget those requests only that it keeps. One that
    has `subscribes` is given those kinds of feedback, which are some of those that its spec names:
    so many as its options need. Prefix blocks ("cache") are reported where some operator asks for
    them in this way, and then to all whose specs name them.
    """

    @property
    def initial(self) -> S: ...

    def on(self, state: S, happened: Input, now: float, draw: Draw) -> Step[S]: ...


class Context(Protocol):
    """What the executor lends a service operator. `replica` is its own number."""

    name: str
    replica: int

    @property
    def engine(self) -> Engine:
        """The engine that the option `engine` names, of this operator's replica."""

    def engine_of(self, node: str, replica: int) -> Engine:
        """The engine of another operator."""

    def engine_named(self, name: str, replica: int) -> Engine: ...

    def now(self) -> float: ...

    async def emit(self, item: Item, outlet: str = "out") -> None:
        """Send an item, waiting for credit."""

    async def emit_batch(self, items: Iterable[TokenEvent], done: "Sent") -> None:
        """Send the events of one engine step, in order; `done` is called for each once it is sent,
        before anybody can answer to it: its id may be in use again while the others wait.
        """

    async def terminate(self, event: TokenEvent, cause: Exception | None = None) -> None:
        """Send a last event to the sink; `cause` as in `Terminate`."""

    def report(self, feedback: Feedback) -> None:
        """Send feedback upstream."""

    def release(self, key: tuple[str, int]) -> None:
        """Return the credit of an item that this operator took: it no longer holds it."""

    def not_transferred(self, item: Item, *, has_failed: bool) -> None:
        """The blocks of an item that this operator has now do not come: a transfer has failed, or
        was not tried. The item goes on without.
        """


Sent: TypeAlias = Callable[[Context, TokenEvent], None]


@runtime_checkable
class Service(Protocol):
    """An operator that owns something outside: an engine, a socket, a user's async function.

    The executor calls `on_item` in up to `concurrency` tasks. A cancel signal cancels the call
    that holds the request; the executor then emits the terminal event itself, and calls
    `on_signal` in any case, for what the operator left elsewhere (in its engine).
    `holds` says that the credit of an item is kept after `on_item` returns, until `release`.
    """

    concurrency: int
    holds: bool

    def capacity(self, facts: EngineFacts | None) -> Credit:
        """What one replica takes before it returns credit; `facts` are its engine's, if any."""

    async def on_item(self, ctx: Context, item: Item) -> None: ...

    async def on_events(self, ctx: Context, events: tuple[EngineEvent, ...]) -> None:
        """Events of the engine for this operator; called only where the spec has an engine."""

    def on_signal(self, ctx: Context, signal: Signal) -> None: ...

    def recall(self, ctx: Context, key: tuple[str, int]) -> Request | None:
        """The engine lost that sequence: forget it, and return its request with all that was
        emitted of it. None where this operator holds no such.
        """

    def discard(self, ctx: Context, item: Item) -> None:
        """The item was ended before it was taken: free what it holds."""


Build: TypeAlias = Callable[[Any, Setup], "Logic[Any] | Service"]


@dataclass(frozen=True, slots=True)
class OperatorModule:
    """One operator file as the resolver found it: its spec and how to build it from options."""

    spec: OpSpec
    build: Build


Facts: TypeAlias = Mapping[str, EngineFacts]
AsyncFunction: TypeAlias = Callable[..., Awaitable[Any]]
