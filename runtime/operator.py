"""The operator protocol: the inputs of an operator, its outputs, and what it is built with."""

import hashlib
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Generic, Literal, Protocol, TypeAlias, TypeVar, runtime_checkable

import msgspec

from sagellm.graphs.vocabulary import OpSpec
from sagellm.runtime.feedback import Feedback, PrefixesChanged, Topology
from sagellm.runtime.messages import ChoiceKey, Forked, Item, Request, TokenEvent
from sagellm.runtime.port import Engine, EngineEvent, EngineFacts
from sagellm.runtime.prefixes import Hasher, new_hasher


class Credit(msgspec.Struct, frozen=True, array_like=True):
    """Requests, prompt tokens and KV blocks in transit to a replica: its capacity, or a cost."""

    requests: float = math.inf
    tokens: float = math.inf
    blocks: float = math.inf


# (text, `Request.model`) -> token ids
EncodeText: TypeAlias = Callable[[str, str], tuple[int, ...]]


class Arrival(msgspec.Struct, frozen=True, gc=False):
    """An item arrives at an inlet."""

    item: Item
    inlet: str = "in"


class Signal(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """A signal about a request. It overtakes items, goes to every operator, and may come twice.

    `cancel` and `expire` end the request. `forget` comes after the request has ended: operators
    drop what they know of the request.
    """

    kind: Literal["cancel", "expire", "forget"]
    request_id: str
    choice: int | None = None  # None: all choices of the request

    def concerns(self, key: ChoiceKey) -> bool:
        """Whether the signal is about this choice."""
        return key[0] == self.request_id and self.choice in (None, key[1])


class OfferTaken(msgspec.Struct, frozen=True, gc=False):
    """An item that this operator offered (`Offer`) was sent."""

    item: Item


class Wake(msgspec.Struct, frozen=True, gc=False):
    """The time `Step.wake_at` that the operator asked for has come."""


Input: TypeAlias = Arrival | Signal | Feedback | PrefixesChanged | Topology | OfferTaken | Wake


class Emit(msgspec.Struct, frozen=True, gc=False):
    """Send an item. Without credit for the item, the core undoes the whole input and parks it."""

    item: Item
    outlet: str = "out"


class EmitAll(msgspec.Struct, frozen=True, gc=False):
    """Send several items in order in one transaction; a possible answer to `on_batch`."""

    items: Sequence[Item]
    outlet: str = "out"


class EmitFirst(msgspec.Struct, frozen=True):
    """Send one item, on the first of several possible placements that has credit.

    `choices`: for each placement, the placed item and the operator's state after sending it. The
    iterable is read lazily, one placement at a time. If no placement has credit, the core undoes
    the whole input and parks it. `hold_s`: for this many seconds after the first try, only the
    first placement is used, even if others have credit.
    """

    choices: Iterable[tuple[Item, Any]]  # not the choices of a request
    outlet: str = "out"
    hold_s: float = 0.0


class Wait(msgspec.Struct, frozen=True, gc=False):
    """Undo the whole input, and park it until a replica of service operator `node` has credit."""

    node: str


class Offer(msgspec.Struct, frozen=True, gc=False):
    """Send the first of these items that has credit. Without credit for any, nothing happens.

    If an item is sent, the operator gets the input `OfferTaken`; a sent request gets the stamp
    `dispatched_s`. The operator must keep the items that were not sent, as the queue of policy_sort
    does.
    """

    items: tuple[Item, ...]
    outlet: str = "out"


class Terminate(msgspec.Struct, frozen=True):
    """Send the last event of a choice over the implicit outlet `terminal` to the sink.

    `cause`: the exception that ended the choice, if any. It is logged, and callers in this process
    can read it.
    """

    event: TokenEvent
    cause: Exception | None = None


class Announce(msgspec.Struct, frozen=True):
    """Announce to the session that a request became several choices, before sending any of them."""

    forked: Forked


class Report(msgspec.Struct, frozen=True, gc=False):
    """Send feedback upstream."""

    feedback: Feedback


class ScaleEngine(msgspec.Struct, frozen=True, gc=False):
    """Change the number of replicas of an engine from `num_before` to `num_replicas`.

    The executor reports the end of the change by `ScaleEnded`. `reason`: a word for logs and
    metrics.
    """

    engine: str
    num_replicas: int
    num_before: int
    reason: str


OperatorOutput: TypeAlias = (
    Emit | EmitAll | EmitFirst | Wait | Offer | Terminate | Announce | Report | ScaleEngine
)

S = TypeVar("S")


class Step(msgspec.Struct, Generic[S], frozen=True):
    """The answer of a logic operator to an input: its next state, its outputs, and when to wake it.

    `wake_at`: the time of the next input `Wake`, in seconds of the executor's clock; None for no
    wake-up. It replaces an earlier request.
    """

    state: S
    outputs: tuple[OperatorOutput, ...] = ()
    wake_at: float | None = None


class Draw:
    """A random source for one input: its numbers depend only on (seed, node, number of the input).

    An operator may use it only until `on` returns.
    """

    __slots__ = ("_node", "_seed", "count", "number")

    def __init__(self, seed: int, node: str, number: int) -> None:
        self._seed = seed
        self._node = node
        self.number = number
        self.count = 0  # how many random numbers this input has used

    def random(self) -> float:
        """Uniform in [0, 1)."""
        self.count += 1
        salt = self.count.to_bytes(8, "little")
        key = f"{self._seed}/{self._node}/{self.number}".encode()
        digest = hashlib.blake2b(key, digest_size=8, salt=salt).digest()
        return (int.from_bytes(digest, "little") >> 11) * 2.0**-53  # 53 bits: a float has no more

    def below(self, bound: int) -> int:
        """Uniform in 0 ... bound - 1."""
        return int(self.random() * bound)


@dataclass(frozen=True, slots=True)
class Target:
    """An operator with an engine downstream of a router, which chooses one of its replicas.

    `is_next`: whether requests enter the target without passing another service operator.
    `outlets`: the outlets of the router that lead to the target. `prefills_only`: another operator
    decodes what the target has prefilled. `op`: the kind of the operator, such as "decode".
    """

    node: str
    num_replicas: int
    engine: str = ""
    is_next: bool = False
    outlets: frozenset[str] = frozenset()
    prefills_only: bool = False
    op: str = ""


@dataclass(frozen=True, slots=True)
class Setup:
    """The arguments of an operator's `build`: its place in the graph, and functions it may call.

    `facts`: the facts of engines by name, if known. `models`: the names of the engines of each
    model, by the key of the model, the default model first; empty if the graph serves one model.
    """

    name: str
    targets: tuple[Target, ...] = ()  # the targets downstream, up to the next router
    functions: Mapping[str, Callable[..., Any]] = field(default_factory=dict)
    encode: EncodeText | None = None
    seed: int = 0
    facts: Mapping[str, EngineFacts] = field(default_factory=dict)
    models: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    hasher: Hasher = field(default_factory=new_hasher)


class Logic(Protocol[S]):
    """A pure operator: no I/O, no clock, no task. Equal inputs give equal answers.

    Three members are optional. `on_batch(state, items, now, draw) -> Step` gets all items of one
    engine step; its Step must answer every item and keep none. `keeps(state, request_id) -> bool`
    limits the signal "forget" to the requests that the operator keeps. `subscribes` is the subset
    of the spec's feedback kinds that the operator needs with its options. If any operator
    subscribes to prefix blocks ("cache"), all operators whose specs name "cache" get them.
    """

    @property
    def initial(self) -> S: ...

    def on(self, state: S, happened: Input, now: float, draw: Draw) -> Step[S]: ...


class Context(Protocol):
    """The context that the executor lends to replica number `replica` of a service operator."""

    name: str
    replica: int

    @property
    def engine(self) -> Engine:
        """The replica `self.replica` of the engine that the operator's option `engine` names."""

    def engine_of(self, node: str, replica: int) -> Engine:
        """A replica of the engine that the operator `node` uses."""

    def engine_named(self, name: str, replica: int) -> Engine: ...

    def now(self) -> float: ...

    def fail_after(self, seconds: float) -> AbstractContextManager[object]:
        """Cancel the block after `seconds` of the executor's clock. Raises trio.TooSlowError."""

    async def emit(self, item: Item, outlet: str = "out") -> None:
        """Send an item, waiting for credit."""

    async def emit_batch(self, items: Iterable[TokenEvent], done: "Sent") -> None:
        """Send the events of one engine step in order, waiting for credit.

        `done` is called for each event once that event is sent, before any other task runs. A call
        after the whole batch would be too late: while later events wait for credit, a new request
        may already use the id of a request that has ended.
        """

    async def terminate(self, event: TokenEvent, cause: Exception | None = None) -> None:
        """Send the last event of a choice to the sink; `cause` as in `Terminate`."""

    def report(self, feedback: Feedback) -> None:
        """Send feedback upstream."""

    def release(self, key: ChoiceKey) -> None:
        """Return the credit of an item that this operator no longer holds."""

    def not_transferred(self, item: Item, *, has_failed: bool) -> None:
        """Record that the KV blocks of `item` were not transferred; the item continues without.

        `has_failed`: True if a transfer failed, False if no transfer was tried.
        """


# The callback of `Context.emit_batch`.
Sent: TypeAlias = Callable[[Context, TokenEvent], None]


@runtime_checkable
class Service(Protocol):
    """An operator that may wait: for an engine, a socket or a user's async function.

    The executor runs `on_item` in up to `concurrency` tasks. A signal "cancel" or "expire" cancels
    the `on_item` of its request, and the executor emits the last event. The executor then also
    calls `on_signal`, so that the operator can clean up elsewhere, such as in its engine. `holds`:
    whether the credit of an item stays spent after `on_item` returns, until `Context.release`.
    """

    concurrency: int
    holds: bool

    def capacity(self, facts: EngineFacts | None) -> Credit:
        """The credit that one replica grants; `facts`: those of its engine, None without engine."""

    async def on_item(self, ctx: Context, item: Item) -> None: ...

    async def on_events(self, ctx: Context, events: tuple[EngineEvent, ...]) -> None:
        """Handle events of the engine; called only if the operator has an engine."""

    def on_signal(self, ctx: Context, signal: Signal) -> None: ...

    def recall(self, ctx: Context, key: ChoiceKey) -> Request | None:
        """Forget a sequence that the engine lost, and return its request with all emitted tokens.

        Returns None if this operator does not hold the sequence.
        """

    def discard(self, ctx: Context, item: Item) -> None:
        """Free the resources, such as leases, of an item that ends early or goes elsewhere."""


Build: TypeAlias = Callable[[Any, Setup], "Logic[Any] | Service"]


@dataclass(frozen=True, slots=True)
class OperatorModule:
    """An operator as the resolver finds it: its spec, and the function that builds it."""

    spec: OpSpec
    build: Build
