"""Effects: what the core asks its executor to do after an event."""

from dataclasses import dataclass, field
from typing import TypeAlias

import msgspec

from sagellm.runtime.messages import Forked, Item
from sagellm.runtime.notes import Note
from sagellm.runtime.operator import Signal
from sagellm.runtime.user_code import WrongResult, name_of


class OperatorFault(Exception):
    """The operator `node`, or a function that it called, raised `error`."""

    def __init__(self, node: str, error: Exception) -> None:
        super().__init__(node, error)
        self.node = node
        self.error = error

    @property
    def public(self) -> str:
        """A message for clients: the operator and the type of the error.

        The text of the error is left out because it may quote private data.
        """
        if isinstance(self.error, WrongResult):
            return f"{self.node}: {self.error}"
        return f"{self.node}: the operator raised {name_of(self.error)}"


class _Effect(msgspec.Struct, frozen=True, array_like=True):
    """Base of the effects: encoded as a tagged array, which is small.

    `Send` uses `gc=False` to save time; it is never part of a reference cycle.
    """


class Send(_Effect, frozen=True, gc=False, tag="send"):
    """Give an item to a replica of a service operator. Its credit is already spent."""

    node: str
    replica: int
    item: Item


class Deliver(_Effect, frozen=True, tag="deliver"):
    """Give an item to the session. `error`: the exception that ended the choice, if any."""

    item: Item | Forked
    error: Exception | None = None


class Interrupt(_Effect, frozen=True, tag="interrupt"):
    """Give a signal to a replica of a service operator that holds a choice of the request."""

    node: str
    replica: int
    signal: Signal


class Discard(_Effect, frozen=True, tag="discard"):
    """Let the replica that emitted an item free its resources, after an operator failed on it."""

    node: str
    replica: int
    item: Item


class Parked(_Effect, frozen=True, tag="parked"):
    """The first `num_sent` items of a ticket were sent; its other items wait for credit."""

    ticket: int
    num_sent: int


class Resumed(_Effect, frozen=True, tag="resumed"):
    """The next `num_sent` parked items of a ticket were sent."""

    ticket: int
    num_sent: int


class WakeAt(_Effect, frozen=True, tag="wake_at"):
    """Dispatch `TimeCame` at `at_s`; infinite: never. Replaces the previous `WakeAt`."""

    at_s: float


class Faulted(_Effect, frozen=True, tag="faulted"):
    """Log an operator's fault."""

    fault: OperatorFault
    request_id: str


class FailedOn(_Effect, frozen=True, tag="failed_on"):
    """Log that the engine of a replica failed on a request, with the error."""

    engine: str
    replica: int
    request_id: str
    error: str


class Ejected(_Effect, frozen=True, tag="ejected"):
    """Log that a replica gets no new requests for `for_s` seconds, or with 0 gets them again."""

    engine: str
    replica: int
    for_s: float


class Assigned(_Effect, frozen=True, tag="assigned"):
    """Log that a replica takes requests of an operator, or no more."""

    node: str
    replica: int
    is_on: bool


class QueryCache(_Effect, frozen=True, tag="ask_cache"):
    """Ask the engine of a replica to report all its prefix blocks, and then every change."""

    engine: str
    replica: int


class Noted(_Effect, frozen=True, tag="noted"):
    """Log a note of the operator `node`: the arm of a request, or a disagreement of a shadow."""

    node: str
    note: Note


class ScaleTo(_Effect, frozen=True, tag="scale_to"):
    """Change the number of replicas of an engine, and report the end of it by `ScaleEnded`."""

    engine: str
    num_replicas: int
    num_before: int
    reason: str


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
    | Assigned
    | QueryCache
    | Noted
    | ScaleTo
)


@dataclass(slots=True)
class Reaction:
    """The time of the current event and its effects so far; shared by all parts of the core."""

    now: float = 0.0
    effects: list[Effect] = field(default_factory=list)

    def time(self) -> float:
        return self.now
