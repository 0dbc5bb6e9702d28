"""Feedback: what operators and the core report upstream, one struct for each kind.

The fields `node`, `replica` and `sequence` name the reporter. Operators leave them out, and the
core fills them in. `sequence` rises by one for each (node, replica, kind).
"""

from typing import TypeAlias

import msgspec

from sagellm.runtime.messages import EngineReplica
from sagellm.runtime.port import EngineLoad
from sagellm.runtime.prefixes import PrefixIndex


class Backlog(msgspec.Struct, frozen=True):
    """The value of feedback "queue". Tokens are those that an engine has to compute.

    `num_served`, `num_served_tokens` and `busy_s` count from the opening of the graph: requests
    that were sent on, and seconds that passed, while requests waited or the engines were full. Room
    that came while nothing waited counts as one request of mean size. A request that is sent on as
    it arrives, to an engine with room, does not count: it says nothing of how fast room comes.
    """

    num_requests: int = 0
    num_tokens: int = 0  # uncached prompt tokens and max_tokens
    num_prompt_tokens: int = 0
    num_patient: int = 0  # requests that let all requests with an objective go first
    num_patient_tokens: int = 0  # of the prompts of patient requests
    num_served: int = 0
    num_served_tokens: int = 0  # of prompts
    busy_s: float = 0.0
    num_full: int = 0  # queues whose engines have no room for any request

    @property
    def is_open(self) -> bool:
        """Whether a request that arrives now is sent on at once."""
        return not (self.num_requests or self.num_full)


class _Report(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    node: str = ""
    replica: int = 0
    sequence: int = 0


class CreditChanged(_Report, frozen=True, tag="credit"):
    """A replica granted or returned credit: `num_left` requests may be sent to it now."""

    num_left: float = 0.0
    request_id: str = ""


class LoadReported(_Report, frozen=True, tag="load"):
    """The load of an engine after a step; only the latest report counts."""

    load: EngineLoad


class QueueChanged(_Report, frozen=True, tag="queue"):
    """The requests that wait in an operator."""

    backlog: Backlog


class FirstToken(_Report, frozen=True, tag="first_token"):
    """A first token was emitted `seconds` after its request left the queue.

    `computed_s`: the part of that time in which the engine computed the prompt, of which it
    computed `num_computed_tokens`; 0 where unknown. `since_arrival_s`: since the request arrived;
    None where the token is not the first of its answer. `slo_ttft_s`: the objective of the request.
    """

    seconds: float
    num_computed_tokens: int = 0
    computed_s: float = 0.0
    since_arrival_s: float | None = None
    slo_ttft_s: float | None = None


class RoomChanged(_Report, frozen=True, tag="room"):
    """Whether any service operator that requests of `node` enter next has credit for a request.

    The core reports to each subscriber its own room, at the end of an event; `node` is the
    subscriber.
    """

    has_room: bool


class HealthChanged(_Report, frozen=True, tag="health"):
    """The engine of a replica is up, or is lost or ejected."""

    is_up: bool


Feedback: TypeAlias = (
    CreditChanged | LoadReported | QueueChanged | FirstToken | RoomChanged | HealthChanged
)
# Struct -> the name by which operators subscribe.
KINDS: dict[type, str] = {kind: str(kind.__struct_config__.tag) for kind in Feedback.__args__}


class Topology(msgspec.Struct, frozen=True, tag="topology"):
    """The replicas of all engines. `epoch` rises with each change.

    `num_replicas`: by engine, removed replicas included, so that numbers are 0 ... num_replicas -
    1. `removed`: replicas that will not come back.
    """

    epoch: int = 0
    num_replicas: dict[str, int] = {}
    removed: frozenset[EngineReplica] = frozenset()


class PrefixesChanged(msgspec.Struct, frozen=True, gc=False, tag="prefixes"):
    """The prefix blocks of all replicas of an engine, for operators that subscribe to "cache".

    The core keeps one index for each engine, shared by all operators.
    """

    engine: str
    index: PrefixIndex
