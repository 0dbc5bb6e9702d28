"""Feedback: what operators and the core report upstream, a struct for each kind.

The fields `node`, `replica` and `sequence` say who reports; whoever sends feedback leaves them
out, and the core fills them in. `sequence` rises by one for each (node, replica, kind).
"""

from typing import TypeAlias

import msgspec

from sagellm.runtime.backlog import Backlog
from sagellm.runtime.port import EngineLoad
from sagellm.runtime.prefixes import PrefixIndex


class _Report(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    node: str = ""
    replica: int = 0
    sequence: int = 0


class CreditChanged(_Report, frozen=True, tag="credit"):
    """A replica granted credit, or returned that of a request: `num_left` may be sent to it now."""

    num_left: float = 0.0
    request_id: str = ""


class LoadReported(_Report, frozen=True, tag="load"):
    """The load of an engine after a step; the latest report counts."""

    load: EngineLoad


class QueueChanged(_Report, frozen=True, tag="queue"):
    """What waits in an operator."""

    backlog: Backlog


class FirstToken(_Report, frozen=True, tag="first_token"):
    """A first token came that long after its request left its queue. Of that, `computed_s` went by
    from when an engine began on its prompt, of which it computed `num_computed_tokens`; 0: unknown.
    `since_arrival_s`: after the request arrived; None where it is not the first of its answer.
    `slo_ttft_s`: the objective of the request for that.
    """

    seconds: float
    num_computed_tokens: int = 0
    computed_s: float = 0.0
    since_arrival_s: float | None = None
    slo_ttft_s: float | None = None


class RoomChanged(_Report, frozen=True, tag="room"):
    """Whether any service operator that requests enter next, after the operator that is told, has
    credit for a request. The core tells each subscriber (`node`) of its own at the end of an event.
    """

    has_room: bool


class HealthChanged(_Report, frozen=True, tag="health"):
    """The engine of a replica is there, or is lost or ejected."""

    is_up: bool


Feedback: TypeAlias = (
    CreditChanged | LoadReported | QueueChanged | FirstToken | RoomChanged | HealthChanged
)
KINDS: dict[type, str] = {
    kind: str(kind.__struct_config__.tag) for kind in Feedback.__args__
}  # the name by which an operator subscribes to a kind


class Topology(msgspec.Struct, frozen=True, tag="topology"):
    """Which replicas there are. `epoch` rises with each change.

    `num_replicas`: by engine, removed ones counted, so that numbers are 0 ... num_replicas - 1.
    `removed`: (engine, number) of those that will not come back.
    """

    epoch: int = 0
    num_replicas: dict[str, int] = {}
    removed: frozenset[tuple[str, int]] = frozenset()


class PrefixesChanged(msgspec.Struct, frozen=True, gc=False, tag="prefixes"):
    """Which replicas of an engine have which prefix blocks, by now: what operators are given that
    subscribe to "cache". The core keeps one index an engine, whoever asks.
    """

    engine: str
    index: PrefixIndex
