"""Events: all that may change a decision of the core.

The log of (now, event) is the log of its decisions.
"""

from typing import TypeAlias

import msgspec

from sagellm.runtime.feedback import Feedback
from sagellm.runtime.messages import FinishReason, Item, Request, TokenEvent
from sagellm.runtime.operator import Credit, Signal
from sagellm.runtime.port import LossCause
from sagellm.runtime.prefixes import CacheChanged


class _Event(msgspec.Struct, frozen=True, array_like=True):
    """Tagged, and an array on the wire: most events are small. The most frequent ones, which are
    never part of a cycle, are `gc=False`: that costs less.
    """


class Opened(_Event, frozen=True, tag="opened"):
    """A replica of a service operator is there, and grants so much credit."""

    node: str
    replica: int
    capacity: Credit
    block_size: int = 1


class Arrived(_Event, frozen=True, gc=False, tag="arrived"):
    """All choices of one request are to enter through `source`. The id is in use by no other.

    Where there is no credit for one, the effect `Parked` names the ticket.
    """

    ticket: int
    requests: tuple[Request, ...]


class Emitted(_Event, frozen=True, gc=False, tag="emitted"):
    """A service operator sends items, in order. Where there is no credit for one, it and the later
    items are parked, and the effect `Parked` names the ticket.
    """

    ticket: int
    node: str
    replica: int
    items: tuple[Item, ...]
    outlet: str = "out"


class Withdrawn(_Event, frozen=True, tag="withdrawn"):
    """The task that waits for a ticket is gone: forget what is parked."""

    ticket: int


class Released(_Event, frozen=True, gc=False, tag="released"):
    """A service operator holds an item no more: its credit is free."""

    node: str
    replica: int
    request_id: str
    choice: int


class Ended(_Event, frozen=True, tag="ended"):
    """A service operator ends a choice. `error`: what it raised, if it did."""

    node: str
    event: TokenEvent
    error: Exception | None = None


class Failed(_Event, frozen=True, tag="failed"):
    """A service operator raised while it had an item."""

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
    """The engine of a replica failed while it computed a request, and has let go of it. `last`: the
    event that ends the request, unless another replica takes it.
    """

    node: str
    replica: int
    request: Request
    last: TokenEvent


class Transferred(_Event, frozen=True, tag="transferred"):
    """KV blocks were transferred between replicas of two engines, or were damaged on the way."""

    sender: tuple[str, int]
    receiver: tuple[str, int]
    succeeded: bool


class Reported(_Event, frozen=True, gc=False, tag="reported"):
    """A service operator gives feedback."""

    feedback: Feedback


class CacheReported(_Event, frozen=True, gc=False, tag="cache_reported"):
    """An engine says which prefix blocks it has."""

    changed: CacheChanged


class Signalled(_Event, frozen=True, tag="signalled"):
    """A caller ends a request, or one choice of it."""

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
    """A replica that was lost will not come back."""

    engine: str
    replica: int


class TimeCame(_Event, frozen=True, tag="time_came"):
    """The time of the last `WakeAt` has come."""


class Stopped(_Event, frozen=True, tag="stopped"):
    """The graph stops: end every choice that is open as failed."""


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
