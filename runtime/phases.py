"""How long each phase of a request took, from its stamps."""

from typing import NamedTuple

from sagellm.runtime.messages import Stamps


class Phases(NamedTuple):
    """Seconds; 0 for a phase that the request never reached, or that its graph does not have."""

    queue_s: float = 0.0
    prefill_s: float = 0.0
    transfer_s: float = 0.0
    decode_s: float = 0.0

    def plus(self, other: "Phases") -> "Phases":
        queue_s, prefill_s, transfer_s, decode_s = other
        return Phases(
            self.queue_s + queue_s,
            self.prefill_s + prefill_s,
            self.transfer_s + transfer_s,
            self.decode_s + decode_s,
        )


def phases_of(stamps: Stamps) -> Phases:
    """A request waits until an engine begins with it; each later phase starts where one ended.

    The time a request waits inside its engine belongs to the queue. A request that ended in the
    queue spent all its time there.
    """
    arrived, finished = stamps.arrived_s, stamps.finished_s
    started = _known(stamps.started_s, _known(finished, arrived))
    prefilled = _known(stamps.prefilled_s, _known(finished, started))
    transferred = _known(stamps.transferred_s, prefilled)
    decoded = _known(finished, transferred)
    return Phases(
        started - arrived, prefilled - started, transferred - prefilled, decoded - transferred
    )


def _known(time: float | None, otherwise: float) -> float:
    return otherwise if time is None else time
