"""The strategies that ship."""

import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice

from sagellm.operators.routing.strategy import Candidates, Hold, Order
from sagellm.operators.routing.view import bits, nth_bit
from sagellm.runtime.operator import Draw


def load_balanced(candidates: Candidates, now: float, draw: Draw) -> int:
    return candidates.least_loaded()


def round_robin(candidates: Candidates, now: float, draw: Draw) -> int:
    turn = candidates.turn % candidates.pool.size
    later = candidates.mask >> turn << turn
    return next(bits(later or candidates.mask))


def random(candidates: Candidates, now: float, draw: Draw) -> int:
    return nth_bit(candidates.mask, draw.below(candidates.mask.bit_count()))


def choose_by_key(key: str, replicas: Sequence[int]) -> int:
    """The replica whose hash with the key is highest, the same in every process.

    One more replica takes 1 / (n + 1) of the keys, and moves no other; one that is missing moves
    its own only. Source: Thaler and Ravishankar, Using name-based mappings to increase hit rates,
    1998.
    """
    return max(replicas, key=lambda replica: _weight(key, replica))


def choose_bounded(key: str, candidates: Candidates, load_factor: float | None) -> int:
    """The first replica in the order of their hashes that would not have more than `load_factor`
    times the mean number of requests; the first of all, where there is no bound.

    Source: Mirrokni, Thorup and Zadimoghaddam, Consistent hashing with bounded loads, 2018; here
    over rendezvous hashing.
    """
    numbers = candidates.numbers
    if load_factor is None:
        return choose_by_key(key, numbers)
    num_requests = sum(map(candidates.num_requests, numbers)) + 1
    most = math.ceil(load_factor * num_requests / len(numbers))
    room = [number for number in numbers if candidates.num_requests(number) < most]
    return choose_by_key(key, room or numbers)


def _weight(key: str, replica: int) -> bytes:
    salt = replica.to_bytes(8, "little")
    return hashlib.blake2b(key.encode(), digest_size=8, salt=salt).digest()


@dataclass(frozen=True, slots=True)
class Affinity:
    """`load_factor`: how many times the mean load a replica may have; None: any."""

    load_factor: float | None = field(default=None, metadata={"min": 1.0})

    @property
    def initial(self) -> None:
        return None

    def order(
        self, state: None, candidates: Candidates, now: float, draw: Draw
    ) -> tuple[int, None]:
        request = candidates.request
        key = request.tags.get("key") or request.user_id
        if not key:
            return candidates.least_loaded(), None
        return choose_bounded(key, candidates, self.load_factor), None


@dataclass(frozen=True, slots=True)
class Locality:
    """`load_factor`: how many times the mean load a replica may have; None: any."""

    load_factor: float | None = field(default=None, metadata={"min": 1.0})

    @property
    def initial(self) -> None:
        return None

    def order(
        self, state: None, candidates: Candidates, now: float, draw: Draw
    ) -> tuple[int, None]:
        request = candidates.request
        if not request.model and not request.user_id:
            return candidates.least_loaded(), None
        key = f"{request.model}:{request.user_id}"
        return choose_bounded(key, candidates, self.load_factor), None


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
