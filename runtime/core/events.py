"""Events: the inputs of the core. All its decisions follow from its events and their times."""

from typing import TypeAlias

import msgspec

from sagellm.runtime.feedback import Feedback
from sagellm.runtime.messages import EngineReplica, FinishReason, Item, Request, TokenEvent
from sagellm.runtime.operator import Credit, Signal
from sagellm.runtime.port import LossCause
from sagellm.runtime.prefixes import CacheChanged


class _Event(msgspec.Struct, frozen=True, array_like=True):
    """Base of the events: encoded as a tagged array, which is small.

    The most frequent events use `gc=False` to save time; they are never part of a reference cycle.
    """


class Opened(_Event, frozen=True, tag="opened"):
    """A replica of a service operator is up, and grants the credit `capacity`.

    `can_resume`: its engine can go on with an answer that another engine began.
    """

    node: str
    replica: int
    capacity: Credit
    block_size: int = 1
    can_resume: bool = False


class Arrived(_Event, frozen=True, gc=False, tag="arrived"):
    """All choices of one request arrive at `source`. No open request has the same id.

    If a choice has no credit, it is parked with all later choices, and the effect `Parked` has the
    ticket.
    """

    ticket: int
    requests: tuple[Request, ...]


class Emitted(_Event, frozen=True, gc=False, tag="emitted"):
    """A service operator sends items in order.

    If an item has no credit, it is parked with all later items, and the effect `Parked` has the
    ticket.
    """

    ticket: int
    node: str
    replica: int
    items: tuple[Item, ...]
    outlet: str = "out"


class Withdrawn(_Event, frozen=True, tag="withdrawn"):
    """The task that waited for a ticket was cancelled: the parked items must be dropped."""

    ticket: int


class Released(_Event, frozen=True, gc=False, tag="released"):
    """A service operator no longer holds an item, and returns its credit."""

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
    """A service operator raised an exception on an item."""

    node: str
    item: Item
    error: Exception


class Finished(_Event, frozen=True, tag="finished"):
    """A service operator dropped an item because of a signal; the choice must end."""

    item: Item
    reason: FinishReason


class Returned(_Event, frozen=True, tag="returned"):
    """A request was lost with an engine of the operator `node`, and may enter again."""

    node: str
    request: Request
    cause: LossCause


class Preempted(_Event, frozen=True, tag="preempted"):
    """An engine has stopped computing a request after the effect `Preempt`, and released it.

    `request` has all emitted tokens.
    """

    node: str
    request: Request


class EngineFailed(_Event, frozen=True, tag="engine_failed"):
    """An engine failed on a request, and has released the request.

    `last`: the event that ends the choice, unless the core sends the request to another replica.
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
    """A service operator reports feedback."""

    feedback: Feedback


class CacheReported(_Event, frozen=True, gc=False, tag="cache_reported"):
    """An engine reports its prefix blocks."""

    changed: CacheChanged


class Signalled(_Event, frozen=True, tag="signalled"):
    """A caller cancels a request or one of its choices."""

    signal: Signal


class ReplicaAdded(_Event, frozen=True, tag="replica_added"):
    """An engine got one more replica, which is not up yet."""

    engine: str


class ReplicaMarked(_Event, frozen=True, tag="replica_marked"):
    """A replica of an engine is up, or was lost."""

    engine: str
    replica: int
    is_up: bool


class ReplicaRemoved(_Event, frozen=True, tag="replica_removed"):
    """A lost replica will not come back."""

    engine: str
    replica: int


class TimeCame(_Event, frozen=True, tag="time_came"):
    """The time of the latest effect `WakeAt` has come."""


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
    | Preempted
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
