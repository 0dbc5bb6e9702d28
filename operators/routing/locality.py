"""locality: all requests of one model and user on one replica (a hash of `model:user`).

A request that names neither goes to the least loaded, for all of those would meet in one place.
"""

from sagellm.operators.routing.rendezvous import choose_by_key
from sagellm.operators.routing.view import Pool, View
from sagellm.runtime.messages import Request
from sagellm.runtime.operator import Draw


def choose(request: Request, pool: Pool, view: View, draw: Draw) -> int:
    if not request.model and not request.user_id:
        return pool.least_loaded(request, view)
    return choose_by_key(f"{request.model}:{request.user_id}", pool.live(view))
