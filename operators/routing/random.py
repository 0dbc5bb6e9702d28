"""random: each replica with equal probability, from the graph's seed."""

from sagellm.operators.routing.candidates import Candidates
from sagellm.operators.routing.replicas import nth_bit
from sagellm.runtime.operator import Draw


def choose(candidates: Candidates, now: float, draw: Draw) -> int:
    return nth_bit(candidates.mask, draw.below(candidates.mask.bit_count()))
