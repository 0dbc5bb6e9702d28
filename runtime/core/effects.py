"""Effects: what the core asks its shell to do, in order."""

from typing import TypeAlias

import msgspec

from sagellm.runtime.core.faults import OperatorFault
from sagellm.runtime.messages import Forked, Item
from sagellm.runtime.operator import Signal


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


class AskCache(_Effect, frozen=True, tag="ask_cache"):
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
    | AskCache
)
