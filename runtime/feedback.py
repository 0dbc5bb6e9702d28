"""Feedback: what operators and the core report upstream, one struct for each kind.

`node` and `replica` name the reporter. `sequence` rises by one with each report of the same node,
replica and kind. Operators leave the three fields out, and the core fills them in.
"""

from typing import TypeAlias

import msgspec

from sagellm.runtime.messages import EngineReplica
from sagellm.runtime.port import EngineLoad
from sagellm.runtime.prefixes import PrefixIndex


class Backlog(msgspec.Struct, frozen=True):
    """The requests that wait in a queue, and how fast the queue has been served.

    Prompt tokens are those that an engine must compute, without cached tokens. `busy_s`: the time
    since the graph was opened during which requests waited or the engines were full, in seconds.
    `num_served`: requests that were sent to engines during that time. A request that never waited
    does not count, because it shows nothing of how fast engines get room. If an engine gets room
    while the queue is empty, one request of mean size is counted.
    """

    num_requests: int = 0
    num_tokens: int = 0  # uncached prompt tokens and max_tokens
    num_prompt_tokens: int = 0
    num_patient: int = 0  # requests without an objective, in a queue that serves them last
    num_patient_tokens: int = 0  # prompt tokens of these requests
    num_served: int = 0
    num_served_tokens: int = 0  # prompt tokens of the served requests
    busy_s: float = 0.0
    num_full: int = 0  # queues whose engines have no room for any request

    @property
    def is_open(self) -> bool:
        """Whether a request that arrives now is sent to an engine at once."""
        return not (self.num_requests or self.num_full)


class _Report(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    node: str = ""
    replica: int = 0
    sequence: int = 0


class CreditChanged(_Report, frozen=True, tag="credit"):
    """A replica granted credit, or got credit back; now `num_left` requests may be sent to it.

    `request_id`: the request that returned its credit, or empty.
    """

    num_left: float = 0.0
    request_id: str = ""


class LoadReported(_Report, frozen=True, tag="load"):
    """The load of an engine after a step; each report replaces the previous report."""

    load: EngineLoad


class QueueChanged(_Report, frozen=True, tag="queue"):
    """The backlog of an operator with a queue has changed."""

    backlog: Backlog


class FirstToken(_Report, frozen=True, tag="first_token"):
    """A first token was emitted `seconds` after its request left the queue, or arrived without one.

    `num_computed_tokens`, `computed_s`: the prompt tokens that the engine computed, and the time
    that it took; 0 if unknown. `since_arrival_s`: the TTFT, in seconds from the arrival; None for a
    request that resumes. `slo_ttft_s`: the TTFT objective of the request, whose id is `request_id`.
    """

    seconds: float
    num_computed_tokens: int = 0
    computed_s: float = 0.0
    since_arrival_s: float | None = None
    slo_ttft_s: float | None = None
    request_id: str = ""


class KVMoved(_Report, frozen=True, tag="transfer"):
    """The KV blocks of `num_tokens` tokens were moved to the decode pool, in `seconds`."""

    num_tokens: int
    seconds: float


class RoleAssigned(_Report, frozen=True, tag="role"):
    """Replica `number` takes requests of the operator `operator`, or no more (`is_on` False).

    The core opens or closes the gate, and reports the health of the operator's replica. Requests
    that the replica has, or that are on their way there, are served to their end.
    """

    operator: str
    number: int
    is_on: bool


class RoomChanged(_Report, frozen=True, tag="room"):
    """Whether any service operator that requests from `node` enter next has credit for a request.

    The core sends the report to `node` itself, if `node` subscribes to "room".
    """

    has_room: bool


class HealthChanged(_Report, frozen=True, tag="health"):
    """The engine of a replica is up, or it was lost or ejected."""

    is_up: bool


class ScaleEnded(_Report, frozen=True, tag="scale"):
    """A change of the number of replicas of `engine` has ended. `error`: why it failed, if it did;
    the number of replicas is then unchanged.

    The executor sends the report for an operator `node` that uses the engine.
    """

    engine: str
    error: str = ""


Feedback: TypeAlias = (
    CreditChanged
    | LoadReported
    | QueueChanged
    | FirstToken
    | KVMoved
    | RoleAssigned
    | RoomChanged
    | HealthChanged
    | ScaleEnded
)
# Struct -> the name by which operators subscribe.
KINDS: dict[type, str] = {kind: str(kind.__struct_config__.tag) for kind in Feedback.__args__}


class Topology(msgspec.Struct, frozen=True, tag="topology"):
    """The replicas of all engines. `epoch` rises with each change.

    `num_replicas`: by engine, the number of replicas so far. Removed replicas are included: replica
    numbers are 0 ... `num_replicas` - 1. `removed`: lost replicas that will not come back.
    """

    epoch: int = 0
    num_replicas: dict[str, int] = {}
    removed: frozenset[EngineReplica] = frozenset()


class PrefixesChanged(msgspec.Struct, frozen=True, gc=False, tag="prefixes"):
    """The prefix blocks of an engine's replicas have changed; for subscribers to "cache".

    `index`: the new index, shared by all operators. `for_shadows`: no live operator subscribes.
    """

    engine: str
    index: PrefixIndex
    for_shadows: bool = False
