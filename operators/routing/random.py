"""random: each replica with equal probability, from the graph's seed."""

from sagellm.operators.routing.view import Pool, View
from sagellm.runtime.messages import Request
from sagellm.runtime.operator import Draw


def choose(request: Request, pool: Pool, view: View, draw: Draw) -> int:
    live = pool.live(view)
    return live[draw.below(len(live))]
