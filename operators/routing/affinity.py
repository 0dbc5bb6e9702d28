"""affinity: all requests of one key on one replica, so that they find their prefix there.

The key is what `key_by` set, or else the user_id; a request with neither goes to the least loaded.
"""

from sagellm.operators.routing.rendezvous import choose_by_key
from sagellm.operators.routing.view import Pool, View
from sagellm.runtime.messages import Request
from sagellm.runtime.operator import Draw


def choose(request: Request, pool: Pool, view: View, draw: Draw) -> int:
    key = request.tags.get("key") or request.user_id
    if not key:
        return pool.least_loaded(request, view)
    return choose_by_key(key, pool.live(view))
