"""How long each phase of a request took, from its stamps."""

from operator import add
from typing import NamedTuple

from sagellm.runtime.messages import Stamps


class Phases(NamedTuple):
    """Seconds; 0 for a phase that the request never reached, or that its graph does not have."""

    queue_s: float = 0.0
    prefill_s: float = 0.0
    transfer_s: float = 0.0
    decode_s: float = 0.0

    def plus(self, other: "Phases") -> "Phases":
        return Phases(*map(add, self, other))


def phases_of(stamps: Stamps) -> Phases:
    """A request waits until an engine begins with it; each later phase starts where one ended.

    The time a request waits inside its engine belongs to the queue. A request that ended in the
    queue spent all its time there.
    """
    started = _first(stamps.started_s, stamps.finished_s, stamps.arrived_s)
    prefilled = _first(stamps.prefilled_s, stamps.finished_s, started)
    transferred = _first(stamps.transferred_s, prefilled)
    return Phases(
        queue_s=started - stamps.arrived_s,
        prefill_s=prefilled - started,
        transfer_s=transferred - prefilled,
        decode_s=_first(stamps.finished_s, transferred) - transferred,
    )


def _first(*times: float | None) -> float:
    """The first that is known; the last one always is."""
    for time in times:
        if time is not None:
            return time
    raise ValueError("no time is known")
