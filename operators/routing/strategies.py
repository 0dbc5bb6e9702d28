"""The strategies that ship. `STRATEGIES` of `sagellm.operators.routing` names them."""

import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice

from sagellm.operators.routing.strategy import Candidates, Hold, Order
from sagellm.operators.routing.view import bits, nth_bit
from sagellm.runtime.operator import Draw

_MOST_COMPARED = 16  # warm replicas that one decision of PrefixAware looks at


def load_balanced(candidates: Candidates, now: float, draw: Draw) -> int:
    """The replica with the least outstanding tokens; ties go round.

    Outstanding: uncached prompt tokens and max_tokens of the requests that this router placed there
    and that have not ended, and as much as the current request for each request that the engine
    reports beyond these (see `ReplicaView.load`). Source: least outstanding tokens, with the local
    increments over a reported snapshot and the rotating tie-break of vLLM's data-parallel load
    balancer.
    """
    return candidates.least_loaded()


def round_robin(candidates: Candidates, now: float, draw: Draw) -> int:
    """One replica after the other, whatever their load."""
    turn = candidates.turn % candidates.pool.size
    later = candidates.mask >> turn << turn
    return next(bits(later or candidates.mask))


def random(candidates: Candidates, now: float, draw: Draw) -> int:
    """Each replica with equal probability, from the graph's seed."""
    return nth_bit(candidates.mask, draw.below(candidates.mask.bit_count()))


def choose_by_key(key: str, replicas: Sequence[int]) -> int:
    """The replica whose hash with the key is highest, the same in every process.

    A new replica takes 1 / (n + 1) of the keys and moves no other key; a lost replica moves only
    its own keys. Source: rendezvous hashing, Thaler and Ravishankar, Using name-based mappings to
    increase hit rates, 1998.
    """
    return max(replicas, key=lambda replica: _weight(key, replica))


def choose_bounded(key: str, candidates: Candidates, load_factor: float | None) -> int:
    """The first replica, in the order of hashes with the key, that would not exceed `load_factor`
    times the mean number of requests; the first of all where `load_factor` is None.

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
    """All requests of one key on one replica, so that they find their prefix there.

    The key is the tag that `key_by` set, or else the user_id; a request with neither goes to the
    least loaded replica. `load_factor`: a replica with so many times the mean number of requests
    takes no more, and the next replica in the order of the key's hashes does; None: no bound.
    """

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
    """All requests of one model and user on one replica (a hash of `model:user`).

    A request that names neither goes to the least loaded replica; by hash all of those would meet
    in one place. `load_factor`: as of Affinity.
    """

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


@dataclass(frozen=True, slots=True)
class PrefixAware:
    """The replica that has the least to compute once it has the request.

        cost = outstanding tokens of the replica, as `load_balanced` counts them, * load_weight
             + uncached tokens of the request

    The least cost goes first; ties go round. A cached prefix attracts requests until its replica is
    ahead of another by as many tokens as the prefix saves. Then the other replica computes the
    prefix and has it too, so that no replica becomes a hot spot. With nothing cached the order is
    that of `load_balanced`.

    A decision compares the least loaded replica and the 16 replicas that have the most of the
    prompt; among equals that is another 16 each time. So its cost does not grow with the number of
    replicas: some 20 us beside those of a lookup (see `runtime/prefixes.py`).

    `load_weight`: cached tokens that one outstanding token outweighs; 0 looks at caches alone.
    `max_hold_s`: how long a request waits for a replica without room whose cache has `min_saved` of
    the prompt more than the best replica with room, but no longer than that one would take to
    compute the difference, once that can be predicted; 0: it never waits.

    Source: Dynamo's KV router (prefill that is left after overlap, plus active load; the least).
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
        """A hold for the replica without room that has most of the prompt, if it saves enough."""
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
    """At most _MOST_COMPARED replicas of the mask `among` with a cached part of the prompt, those
    with the longest part first.
    """
    start = candidates.turn % candidates.pool.size
    masks = (mask & among for _, mask in candidates.cached.levels)
    turned = (one for mask in masks for one in _turned(mask, start))
    return islice(turned, _MOST_COMPARED)


def _turned(mask: int, start: int) -> Iterator[int]:
    """The numbers of the set bits from `start` on, and then those before `start`."""
    later = mask >> start << start
    yield from bits(later)
    yield from bits(mask & ~later)
