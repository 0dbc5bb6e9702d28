"""Events: everything that may change a decision of the core.

The log of (now, event) is the decision log.
"""

from typing import TypeAlias

import msgspec

from sagellm.runtime.feedback import Feedback
from sagellm.runtime.messages import EngineReplica, FinishReason, Item, Request, TokenEvent
from sagellm.runtime.operator import Credit, Signal
from sagellm.runtime.port import LossCause
from sagellm.runtime.prefixes import CacheChanged


class _Event(msgspec.Struct, frozen=True, array_like=True):
    """Tagged, and an array on the wire, as most events are small.

    The most frequent events, which are part of no reference cycle, use `gc=False` because it is
    cheaper.
    """


class Opened(_Event, frozen=True, tag="opened"):
    """A replica of a service operator is up, and grants credit."""

    node: str
    replica: int
    capacity: Credit
    block_size: int = 1


class Arrived(_Event, frozen=True, gc=False, tag="arrived"):
    """All choices of one request are to enter through `source`. No open request has the same id.

    If a choice has no credit, the effect `Parked` names the ticket.
    """

    ticket: int
    requests: tuple[Request, ...]


class Emitted(_Event, frozen=True, gc=False, tag="emitted"):
    """A service operator sends items, in order.

    If an item has no credit, it and all later items are parked, and the effect `Parked` names the
    ticket.
    """

    ticket: int
    node: str
    replica: int
    items: tuple[Item, ...]
    outlet: str = "out"


class Withdrawn(_Event, frozen=True, tag="withdrawn"):
    """The task that waited for a ticket is gone: drop the parked items."""

    ticket: int


class Released(_Event, frozen=True, gc=False, tag="released"):
    """A service operator no longer holds an item: its credit is free."""

    node: str
    replica: int
    request_id: str
    choice: int


class Ended(_Event, frozen=True, tag="ended"):
    """A service operator ends a choice. `error`: the exception that it raised, if any."""

    node: str
    event: TokenEvent
    error: Exception | None = None


class Failed(_Event, frozen=True, tag="failed"):
    """A service operator raised an exception while it had an item."""

    node: str
    item: Item
    error: Exception


class Finished(_Event, frozen=True, tag="finished"):
    """A signal ended an item that a service operator had taken."""

    item: Item
    reason: FinishReason


class Returned(_Event, frozen=True, tag="returned"):
    """An engine of `node` lost a request."""

    node: str
    request: Request
    cause: LossCause


class EngineFailed(_Event, frozen=True, tag="engine_failed"):
    """The engine of a replica failed while it computed a request, and has released the request.

    `last`: the event that ends the request, unless another replica takes it.
    """

    node: str
    replica: int
    request: Request
    last: TokenEvent


class Transferred(_Event, frozen=True, tag="transferred"):
    """KV blocks were transferred between replicas of two engines, or the transfer failed."""

    sender: EngineReplica
    receiver: EngineReplica
    succeeded: bool


class Reported(_Event, frozen=True, gc=False, tag="reported"):
    """A service operator gives feedback."""

    feedback: Feedback


class CacheReported(_Event, frozen=True, gc=False, tag="cache_reported"):
    """An engine reports its prefix blocks."""

    changed: CacheChanged


class Signalled(_Event, frozen=True, tag="signalled"):
    """A caller ends a request, or one of its choices."""

    signal: Signal


class ReplicaAdded(_Event, frozen=True, tag="replica_added"):
    """An engine has one more replica, which is not up yet."""

    engine: str


class ReplicaMarked(_Event, frozen=True, tag="replica_marked"):
    """A replica of an engine is up, or is lost."""

    engine: str
    replica: int
    is_up: bool


class ReplicaRemoved(_Event, frozen=True, tag="replica_removed"):
    """A lost replica will not come back."""

    engine: str
    replica: int


class TimeCame(_Event, frozen=True, tag="time_came"):
    """The time of the last `WakeAt` has come."""


class Stopped(_Event, frozen=True, tag="stopped"):
    """The graph stops: all open choices end as failed."""


Event: TypeAlias = (
    Opened
    | Arrived
    | Emitted
    | Withdrawn
    | Released
    | Ended
    | Failed
    | Finished
    | Returned
    | EngineFailed
    | Transferred
    | Reported
    | CacheReported
    | Signalled
    | ReplicaAdded
    | ReplicaMarked
    | ReplicaRemoved
    | TimeCame
    | Stopped
)
