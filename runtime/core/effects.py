"""Effects: what the core asks its executor to do, in order."""

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
        """Names the operator and the type of the error, without its text, which may be private."""
        if isinstance(self.error, WrongResult):
            return f"{self.node}: {self.error}"
        return f"{self.node}: the operator raised {name_of(self.error)}"


class _Effect(msgspec.Struct, frozen=True, array_like=True):
    """Tagged, and an array on the wire. `gc=False`, where no reference cycle is possible, is
    cheaper.
    """


class Send(_Effect, frozen=True, gc=False, tag="send"):
    """Give an item to a replica of a service operator; its credit is spent."""

    node: str
    replica: int
    item: Item


class Deliver(_Effect, frozen=True, tag="deliver"):
    """Give an item to the session. `error`: the exception that ended the choice."""

    item: Item | Forked
    error: Exception | None = None


class Interrupt(_Effect, frozen=True, tag="interrupt"):
    """Give a signal to a replica that holds a part of the request."""

    node: str
    replica: int
    signal: Signal


class Discard(_Effect, frozen=True, tag="discard"):
    """Free what an item holds: an operator failed on the item, which this replica had emitted."""

    node: str
    replica: int
    item: Item


class Parked(_Effect, frozen=True, tag="parked"):
    """`num_sent` items of a ticket had credit; the other items wait."""

    ticket: int
    num_sent: int


class Resumed(_Effect, frozen=True, tag="resumed"):
    """`num_sent` more of the parked items of a ticket had credit."""

    ticket: int
    num_sent: int


class WakeAt(_Effect, frozen=True, tag="wake_at"):
    """Send the event `TimeCame` at this time instead of any earlier request; infinite: never."""

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
    """Log that a replica gets no new requests for `for_s` seconds; 0: it gets them again."""

    engine: str
    replica: int
    for_s: float


class QueryCache(_Effect, frozen=True, tag="ask_cache"):
    """Ask the engine of a replica to report all prefix blocks, and later changes."""

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
    """The time of the current event and its effects so far; shared by all parts of the core."""

    now: float = 0.0
    effects: list[Effect] = field(default_factory=list)

    def time(self) -> float:
        return self.now
