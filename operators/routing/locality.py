"""locality: all requests of one model and user on one replica (a hash of `model:user`).

A request that names neither goes to the least loaded, for all of those would meet in one place.
"""

from sagellm.operators.routing.candidates import Candidates
from sagellm.operators.routing.rendezvous import choose_by_key
from sagellm.runtime.operator import Draw


def choose(candidates: Candidates, now: float, draw: Draw) -> int:
    request = candidates.request
    if not request.model and not request.user_id:
        return candidates.least_loaded()
    return choose_by_key(f"{request.model}:{request.user_id}", candidates.numbers)
