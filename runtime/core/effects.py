"""Effects: what the core asks its shell to do, in order."""

from dataclasses import dataclass, field
from typing import TypeAlias

import msgspec

from sagellm.runtime.messages import Forked, Item
from sagellm.runtime.operator import Signal
from sagellm.runtime.user_code import WrongResult, name_of


class OperatorFault(Exception):
    """`error` was raised by the operator `node`, or by a function that it called."""

    def __init__(self, node: str, error: Exception) -> None:
        super().__init__(node, error)
        self.node = node
        self.error = error

    @property
    def public(self) -> str:
        """Names operator and type; not the error's text, which may be private."""
        if isinstance(self.error, WrongResult):
            return f"{self.node}: {self.error}"
        return f"{self.node}: the operator raised {name_of(self.error)}"


class _Effect(msgspec.Struct, frozen=True, array_like=True):
    """`gc=False`, where it can be part of no cycle: it costs less. Tagged, an array on the wire."""


class Send(_Effect, frozen=True, gc=False, tag="send"):
    """Hand an item to a replica of a service operator; its credit is spent."""

    node: str
    replica: int
    item: Item


class Deliver(_Effect, frozen=True, tag="deliver"):
    """Hand an item to the session. `error`: what was raised for a choice that ends by it."""

    item: Item | Forked
    error: Exception | None = None


class Interrupt(_Effect, frozen=True, tag="interrupt"):
    """Give a signal to a replica that holds something of the request."""

    node: str
    replica: int
    signal: Signal


class Discard(_Effect, frozen=True, tag="discard"):
    """An operator failed on an item that a replica emitted: free what the item holds."""

    node: str
    replica: int
    item: Item


class Parked(_Effect, frozen=True, tag="parked"):
    """Of the event with that ticket, `num_sent` items found credit; the others wait for it."""

    ticket: int
    num_sent: int


class Resumed(_Effect, frozen=True, tag="resumed"):
    """`num_sent` more of the parked items of a ticket found credit."""

    ticket: int
    num_sent: int


class WakeAt(_Effect, frozen=True, tag="wake_at"):
    """Give the event `TimeCame` at that time instead of any told before; infinite: never."""

    at_s: float


class Faulted(_Effect, frozen=True, tag="faulted"):
    """Log an operator's fault."""

    fault: OperatorFault
    request_id: str


class FailedOn(_Effect, frozen=True, tag="failed_on"):
    """Log that the engine of a replica failed on a request, and why."""

    engine: str
    replica: int
    request_id: str
    error: str


class Ejected(_Effect, frozen=True, tag="ejected"):
    """Log that a replica gets no new requests for some time; 0 seconds: that it gets them again."""

    engine: str
    replica: int
    for_s: float


class QueryCache(_Effect, frozen=True, tag="ask_cache"):
    """Ask the engine of a replica to report all prefix blocks that it has, and then changes."""

    engine: str
    replica: int


Effect: TypeAlias = (
    Send
    | Deliver
    | Interrupt
    | Discard
    | Parked
    | Resumed
    | WakeAt
    | Faulted
    | FailedOn
    | Ejected
    | QueryCache
)


@dataclass(slots=True)
class Reaction:
    """`now` is in seconds of the shell's clock; the core has no other."""

    now: float = 0.0
    effects: list[Effect] = field(default_factory=list)

    def time(self) -> float:
        return self.now
