"""The operator protocol: the inputs of an operator, its outputs, and what it is built with."""

import hashlib
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, Literal, Protocol, TypeAlias, TypeVar, runtime_checkable

import msgspec

from sagellm.graphs.vocabulary import OpSpec
from sagellm.runtime.feedback import Feedback, PrefixesChanged, Topology
from sagellm.runtime.messages import ChoiceKey, Forked, Item, Request, TokenEvent
from sagellm.runtime.port import Engine, EngineEvent, EngineFacts
from sagellm.runtime.prefixes import Hasher, new_hasher


class Credit(msgspec.Struct, frozen=True, array_like=True):
    """How much may be in transit to one replica: requests, prompt tokens and KV blocks."""

    requests: float = math.inf
    tokens: float = math.inf
    blocks: float = math.inf


# (text, `Request.model`) -> token ids
EncodeText: TypeAlias = Callable[[str, str], tuple[int, ...]]


class Arrival(msgspec.Struct, frozen=True, gc=False):
    """An item at an inlet."""

    item: Item
    inlet: str = "in"


class Signal(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """Overtakes items, goes to every operator, and may come twice.

    `cancel` and `expire` end a request. `forget` says that the last terminal event of a request has
    passed.
    """

    kind: Literal["cancel", "expire", "forget"]
    request_id: str
    choice: int | None = None  # None: all choices of the request

    def concerns(self, key: ChoiceKey) -> bool:
        return key[0] == self.request_id and self.choice in (None, key[1])


class OfferTaken(msgspec.Struct, frozen=True, gc=False):
    """An item of this operator's `Offer` was accepted downstream."""

    item: Item


class Wake(msgspec.Struct, frozen=True, gc=False):
    """The time that the operator asked for by `wake_at` has come."""


Input: TypeAlias = Arrival | Signal | Feedback | PrefixesChanged | Topology | OfferTaken | Wake


class Emit(msgspec.Struct, frozen=True, gc=False):
    """Send an item. Without credit for the item, the whole input is undone and waits."""

    item: Item
    outlet: str = "out"


class EmitAll(msgspec.Struct, frozen=True, gc=False):
    """Send several items in order in one transaction.

    An operator with `on_batch` may answer with it.
    """

    items: Sequence[Item]
    outlet: str = "out"


class EmitFirst(msgspec.Struct, frozen=True):
    """Send the first of these choices that has credit: one item, placed in several ways.

    Each choice comes with the operator's state after it; choices are made as they are tried.
    Without credit for any, the whole input is undone and waits. `hold_s`: the input waits for the
    first choice, for so long from its first try, even where other choices have credit.
    """

    choices: Iterable[tuple[Item, Any]]
    outlet: str = "out"
    hold_s: float = 0.0


class Wait(msgspec.Struct, frozen=True, gc=False):
    """Undo the whole input and wait for credit.

    `node`: the service operator that the item would go to, none of whose replicas has credit.
    """

    node: str


class Offer(msgspec.Struct, frozen=True, gc=False):
    """Send the first of these items that has credit, if any; answered by `OfferTaken`.

    A request that is sent is stamped with the time. Only an operator that keeps the other items may
    offer, such as policy_sort.
    """

    items: tuple[Item, ...]
    outlet: str = "out"


class Terminate(msgspec.Struct, frozen=True):
    """Send the last event of a request over the implicit outlet `terminal` to the sink.

    `cause`: the exception that ended the request, if any, for the log and for a caller in this
    process.
    """

    event: TokenEvent
    cause: Exception | None = None


class Announce(msgspec.Struct, frozen=True):
    """Announce to the session that a request became several choices, before the first of them."""

    forked: Forked


class Report(msgspec.Struct, frozen=True, gc=False):
    """Send feedback upstream."""

    feedback: Feedback


OperatorOutput: TypeAlias = (
    Emit | EmitAll | EmitFirst | Wait | Offer | Terminate | Announce | Report
)

S = TypeVar("S")


class Step(msgspec.Struct, Generic[S], frozen=True):
    """The answer of a logic operator: its next state, its outputs, and when to wake it."""

    state: S
    outputs: tuple[OperatorOutput, ...] = ()
    wake_at: float | None = None


class Draw:
    """A random source: a pure function of (seed, node, number of the input).

    Valid only while that input is answered.
    """

    __slots__ = ("_node", "_seed", "count", "number")

    def __init__(self, seed: int, node: str, number: int) -> None:
        self._seed = seed
        self._node = node
        self.number = number
        self.count = 0  # numbers drawn for this input

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
    """A replicated operator downstream, over which a router chooses.

    `is_next`: requests enter it without passing another service operator. `outlets`: the outlets of
    the own operator that lead there.
    """

    node: str
    num_replicas: int
    engine: str = ""
    is_next: bool = False
    outlets: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class Setup:
    """What an operator is built with: its place in the graph, and functions it may call.

    `facts`: of the engines, where known. `models`: the engines of each model by its key, the
    default model first; empty where the graph serves one model.
    """

    name: str
    targets: tuple[Target, ...] = ()  # downstream, up to the next router
    functions: Mapping[str, Callable[..., Any]] = field(default_factory=dict)
    encode: EncodeText | None = None
    seed: int = 0
    facts: Mapping[str, EngineFacts] = field(default_factory=dict)
    models: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    hasher: Hasher = field(default_factory=new_hasher)


class Logic(Protocol[S]):
    """A pure operator: no I/O, no clock, no task. Equal inputs give equal answers.

    Three members are optional. `on_batch(state, items, now, draw) -> Step` is given all items of
    one engine step; it must answer all and keep none. `keeps(state, request_id) -> bool` limits
    signals "forget" to the requests that the operator keeps. `subscribes` limits the feedback kinds
    of the spec to those that the options need. Prefix blocks ("cache") are reported if any operator
    asks for them in this way, and then to all operators whose specs name them.
    """

    @property
    def initial(self) -> S: ...

    def on(self, state: S, happened: Input, now: float, draw: Draw) -> Step[S]: ...


class Context(Protocol):
    """What the executor lends a service operator. `replica`: the operator's own number."""

    name: str
    replica: int

    @property
    def engine(self) -> Engine:
        """The engine of the option `engine`, at this operator's replica."""

    def engine_of(self, node: str, replica: int) -> Engine:
        """The engine of another operator."""

    def engine_named(self, name: str, replica: int) -> Engine: ...

    def now(self) -> float: ...

    async def emit(self, item: Item, outlet: str = "out") -> None:
        """Send an item, waiting for credit."""

    async def emit_batch(self, items: Iterable[TokenEvent], done: "Sent") -> None:
        """Send the events of one engine step, in order.

        `done` is called for each event once it is sent and before anybody can react to it: the
        request id may be in use again while later events still wait.
        """

    async def terminate(self, event: TokenEvent, cause: Exception | None = None) -> None:
        """Send a last event to the sink; `cause` as in `Terminate`."""

    def report(self, feedback: Feedback) -> None:
        """Send feedback upstream."""

    def release(self, key: ChoiceKey) -> None:
        """Return the credit of an item that this operator no longer holds."""

    def not_transferred(self, item: Item, *, has_failed: bool) -> None:
        """Record that the KV blocks of the current item do not come.

        `has_failed`: a transfer has failed; False where none was tried. The item goes on without
        blocks.
        """


Sent: TypeAlias = Callable[[Context, TokenEvent], None]


@runtime_checkable
class Service(Protocol):
    """An operator that owns something outside: an engine, a socket, a user's async function.

    The executor calls `on_item` in up to `concurrency` tasks. A cancel signal cancels the call that
    holds the request. The executor then emits the terminal event, and always calls `on_signal`, so
    that the operator can clean up elsewhere, such as in its engine. `holds`: the credit of an item
    is kept after `on_item` returns, until `release`.
    """

    concurrency: int
    holds: bool

    def capacity(self, facts: EngineFacts | None) -> Credit:
        """The credit that one replica grants; `facts` are those of its engine, if any."""

    async def on_item(self, ctx: Context, item: Item) -> None: ...

    async def on_events(self, ctx: Context, events: tuple[EngineEvent, ...]) -> None:
        """Handle events of the engine; called only where the spec has an engine."""

    def on_signal(self, ctx: Context, signal: Signal) -> None: ...

    def recall(self, ctx: Context, key: ChoiceKey) -> Request | None:
        """Forget a sequence that the engine lost, and return its request with all emitted tokens.

        None where this operator does not hold the sequence.
        """

    def discard(self, ctx: Context, item: Item) -> None:
        """Free what an item holds that ended before the operator took it."""


Build: TypeAlias = Callable[[Any, Setup], "Logic[Any] | Service"]


@dataclass(frozen=True, slots=True)
class OperatorModule:
    """One operator that the resolver found: its spec, and how to build it from options."""

    spec: OpSpec
    build: Build
