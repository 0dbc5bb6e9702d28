"""affinity: all requests of one key on one replica, so that they find their prefix there.

The key is what `key_by` set, or else the user_id; a request with neither goes to the least loaded.
"""

from sagellm.operators.routing.candidates import Candidates
from sagellm.operators.routing.rendezvous import choose_by_key
from sagellm.runtime.operator import Draw


def choose(candidates: Candidates, now: float, draw: Draw) -> int:
    request = candidates.request
    key = request.tags.get("key") or request.user_id
    if not key:
        return candidates.least_loaded()
    return choose_by_key(key, candidates.numbers)
