"""load_balanced: the replica with the least outstanding tokens; ties go round.

Outstanding: uncached prompt tokens and max_tokens of the requests that this router placed there
and that are not over, and as much as the request in hand for each request that the engine reports
beyond these (see `routing/view.py`). Source: least outstanding tokens, with the local increments
over a reported snapshot and the rotating tie-break of vLLM's data-parallel load balancer.
"""

from sagellm.operators.routing.candidates import Candidates
from sagellm.runtime.operator import Draw


def choose(candidates: Candidates, now: float, draw: Draw) -> int:
    return candidates.least_loaded()
