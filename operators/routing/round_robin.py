"""round_robin: one replica after the other, whatever their load."""

from sagellm.operators.routing.candidates import Candidates
from sagellm.operators.routing.replicas import bits
from sagellm.runtime.operator import Draw


def choose(candidates: Candidates, now: float, draw: Draw) -> int:
    turn = candidates.turn % candidates.pool.size
    later = candidates.mask >> turn << turn
    return next(bits(later or candidates.mask))
