"""locality: all requests of one model and user on one replica (a hash of `model:user`).

A request that names neither goes to the least loaded, for all of those would meet in one place.
With `load_factor` a replica that has so many times the mean number of requests takes no more: the
next in the order of the key's hashes does.
"""

from dataclasses import dataclass, field

from sagellm.operators.routing.candidates import Candidates
from sagellm.operators.routing.rendezvous import choose_bounded
from sagellm.runtime.operator import Draw


@dataclass(frozen=True, slots=True)
class Locality:
    """`load_factor`: how many times the mean load a replica may have; None: any."""

    load_factor: float | None = field(default=None, metadata={"min": 1.0})

    @property
    def initial(self) -> None:
        return None

    def order(
        self, state: None, candidates: Candidates, now: float, draw: Draw
    ) -> tuple[int, None]:
        request = candidates.request
        if not request.model and not request.user_id:
            return candidates.least_loaded(), None
        key = f"{request.model}:{request.user_id}"
        return choose_bounded(key, candidates, self.load_factor), None
