"""prefix_aware: the replica that has least to compute once it has the request.

    cost = outstanding tokens of the replica, as `load_balanced` counts them, * load_weight
         + uncached tokens of the request

The least cost goes first; ties go round. So a cached prefix draws requests until its replica is
ahead of another by as many tokens as are saved there: then the other one computes the prefix, has
it too, and no replica is a hot spot. With nothing cached it is `load_balanced`.

Compared are the least loaded replica and, of those that have something of the prompt, the 16 that
have most; among equals that is another 16 each time. So a decision does not cost more where there
are more replicas: some 20 us beside those of a lookup (see `runtime/prefixes.py`).

With `max_hold_s` a request waits up to that long for a replica without room, where that has
`min_saved` of the prompt more in its cache than the best one that has room; but no longer than the
other one would take to compute what is saved, once that can be predicted. 0: it never waits.

Source: Dynamo's KV router (prefill that is left after overlap, plus active load; the least).
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice

from sagellm.operators.routing.candidates import Candidates
from sagellm.operators.routing.replicas import bits
from sagellm.operators.routing.strategy import Hold, Order
from sagellm.runtime.operator import Draw

_MOST_COMPARED = 16


@dataclass(frozen=True, slots=True)
class PrefixAware:
    """`load_weight`: cached tokens that one outstanding token outweighs; 0 looks at caches alone.
    `max_hold_s`: how long a request waits for a warm replica without room; `min_saved`: the share
    of its prompt that must be saved by that.
    """

    load_weight: float = field(default=1.0, metadata={"min": 0.0})
    max_hold_s: float = field(default=0.0, metadata={"min": 0.0})
    min_saved: float = field(default=0.5, metadata={"min": 0.0, "max": 1.0})

    @property
    def subscribes(self) -> frozenset[str]:
        return frozenset({"cache", "first_token"} if self.max_hold_s else {"cache"})

    @property
    def initial(self) -> None:
        return None

    def order(
        self, state: None, candidates: Candidates, now: float, draw: Draw
    ) -> tuple[Order, None]:
        idlest = candidates.least_loaded()
        if not candidates.cached.levels:
            return idlest, None
        compared = dict.fromkeys((idlest, *_warm(candidates, candidates.mask)))
        ranked = sorted(compared, key=lambda number: self._cost(candidates, number))
        hold = self._hold(candidates, ranked[0]) if self.max_hold_s else None
        return (ranked if hold is None else [hold, *ranked]), None

    def _cost(self, candidates: Candidates, number: int) -> float:
        num_uncached = candidates.num_uncached_tokens(number)
        return num_uncached + self.load_weight * candidates.load(number)

    def _hold(self, candidates: Candidates, best: int) -> Hold | None:
        """For the replica without room that has most of the prompt, if that is worth it."""
        warmest = next(_warm(candidates, candidates.busy), None)
        if warmest is None:
            return None
        cached = candidates.cached
        num_saved = cached.num_tokens(warmest) - cached.num_tokens(best)
        num_prompt = len(candidates.request.prompt_token_ids)
        if num_saved <= 0 or num_saved < self.min_saved * num_prompt:
            return None
        saved_s = candidates.forecast.prefill_s(num_saved)
        return Hold(warmest, min(self.max_hold_s, math.inf if saved_s is None else saved_s))


def _warm(candidates: Candidates, among: int) -> Iterator[int]:
    """Replicas of the mask `among` that have something of the prompt, those with most first."""
    start = candidates.turn % candidates.pool.size
    masks = (mask & among for _, mask in candidates.cached.levels)
    turned = (one for mask in masks for one in _turned(mask, start))
    return islice(turned, _MOST_COMPARED)


def _turned(mask: int, start: int) -> Iterator[int]:
    """The numbers of the bits that are set, from `start` on, and then those before it."""
    later = mask >> start << start
    yield from bits(later)
    yield from bits(mask & ~later)
