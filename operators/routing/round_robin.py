"""round_robin: one replica after the other, whatever their load."""

from sagellm.operators.routing.view import Pool, View
from sagellm.runtime.messages import Request
from sagellm.runtime.operator import Draw


def choose(request: Request, pool: Pool, view: View, draw: Draw) -> int:
    live = pool.live(view)
    return live[view.num_routed % len(live)]
