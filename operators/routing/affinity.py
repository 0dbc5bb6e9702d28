"""affinity: all requests of one key on one replica, so that they find their prefix there.

The key is what `key_by` set, or else the user_id; a request with neither goes to the least loaded.
With `load_factor` a replica that has so many times the mean number of requests takes no more: the
next in the order of the key's hashes does.
"""

from dataclasses import dataclass, field

from sagellm.operators.routing.candidates import Candidates
from sagellm.operators.routing.rendezvous import choose_bounded
from sagellm.runtime.operator import Draw


@dataclass(frozen=True, slots=True)
class Affinity:
    """`load_factor`: how many times the mean load a replica may have; None: any."""

    load_factor: float | None = field(default=None, metadata={"min": 1.0})

    @property
    def initial(self) -> None:
        return None

    def order(
        self, state: None, candidates: Candidates, now: float, draw: Draw
    ) -> tuple[int, None]:
        request = candidates.request
        key = request.tags.get("key") or request.user_id
        if not key:
            return candidates.least_loaded(), None
        return choose_bounded(key, candidates, self.load_factor), None
