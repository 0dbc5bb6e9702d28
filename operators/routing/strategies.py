"""The shipped strategies of `route`. Their table is `STRATEGIES` of `sagellm.operators.routing`."""

import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice

from sagellm.operators.routing.strategy import Candidates, Hold, Order
from sagellm.operators.routing.view import bits, nth_bit
from sagellm.runtime.operator import Draw

_MOST_COMPARED = 16  # the most replicas with a cached prefix that PrefixAware compares at a time


def load_balanced(candidates: Candidates, now: float, draw: Draw) -> int:
    """The replica with the fewest outstanding tokens; equal replicas take turns.

    Outstanding tokens of a replica: the uncached prompt tokens and max_tokens of all requests that
    this router placed there and that have not ended. If the engine reports further requests, each
    of them counts as many tokens as the current request (see `ReplicaView.load`).

    Source: least outstanding tokens. vLLM's data-parallel load balancer also adds local increments
    to a reported snapshot, and rotates between equal replicas.
    """
    return candidates.least_loaded()


def round_robin(candidates: Candidates, now: float, draw: Draw) -> int:
    """One replica after the other, regardless of their load."""
    turn = candidates.turn % candidates.pool.size
    later = candidates.mask >> turn << turn
    return next(bits(later or candidates.mask))


def random(candidates: Candidates, now: float, draw: Draw) -> int:
    """A random replica; all are equally likely. The random numbers come from the graph's seed."""
    return nth_bit(candidates.mask, draw.below(candidates.mask.bit_count()))


def choose_by_key(key: str, replicas: Sequence[int]) -> int:
    """The replica with the highest hash of key and replica number, the same in every process.

    A new replica takes 1 / (n + 1) of the keys; all other keys keep their replica. If a replica is
    lost, only its own keys move.

    Source: rendezvous hashing, Thaler and Ravishankar, Using name-based mappings to increase hit
    rates, 1998.
    """
    return max(replicas, key=lambda replica: _weight(key, replica))


def choose_bounded(key: str, candidates: Candidates, load_factor: float | None) -> int:
    """The replica with the highest hash among the replicas that, with this request, would have at
    most `load_factor` times the mean number of requests. None: the number is not bounded.

    Source: Mirrokni, Thorup and Zadimoghaddam, Consistent hashing with bounded loads, 2018; here
    with rendezvous hashing.
    """
    numbers = candidates.numbers
    if load_factor is None:
        return choose_by_key(key, numbers)
    num_requests = sum(map(candidates.num_requests, numbers)) + 1  # the request included
    most = math.ceil(load_factor * num_requests / len(numbers))
    room = [number for number in numbers if candidates.num_requests(number) < most]
    return choose_by_key(key, room or numbers)


def _weight(key: str, replica: int) -> bytes:
    """The hash of a key and a replica. `hash` of Python would differ between processes."""
    salt = replica.to_bytes(8, "little")
    return hashlib.blake2b(key.encode(), digest_size=8, salt=salt).digest()


@dataclass(frozen=True, slots=True)
class Affinity:
    """Sends all requests with the same key to the same replica, which has their prefix cached.

    The key is the tag that `key_by` set, or else the user_id. A request with neither goes to the
    least loaded replica. `load_factor`: a replica takes at most `load_factor` times the mean number
    of requests; further requests go to the replica with the next highest hash. None: no bound.
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
    """Sends all requests of the same model and user to the same replica (a hash of `model:user`).

    A request without model and user goes to the least loaded replica; by hash, all such requests
    would go to one replica. `load_factor`: see `Affinity`.
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
    """Sends a request to the replica with the least work left, counting the request's own.

        cost = outstanding tokens of the replica, as `load_balanced` counts them, * load_weight
             + uncached tokens of the request

    The replica with the lowest cost goes first; equal replicas take turns. A cached prefix attracts
    requests until its replica has more outstanding tokens than another replica by the number of
    tokens that the prefix saves. Then the other replica computes and caches the prefix, too, so
    that no replica becomes a hot spot. If nothing is cached, the order is that of `load_balanced`.

    A decision compares the least loaded replica and the 16 replicas with the longest cached prefix;
    if more than 16 are equal, each decision compares another 16. The cost of a decision therefore
    does not grow with the number of replicas: it is some 20 us plus a lookup (see
    `runtime/prefixes.py`).

    `load_weight`: the weight of an outstanding token relative to an uncached token; 0: only caches
    count. `max_hold_s`: the longest time that a request waits for a busy replica; 0: no wait. A
    request waits only if the busy replica has cached more of the prompt than the best replica with
    room, by at least the share `min_saved` of the prompt. The wait is also no longer than the
    predicted time to compute the difference, if there is a prediction.

    Source: Dynamo's KV router (the least of uncached prefill plus active load).
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
        """A hold for the busy replica with the longest cached prefix; None: it saves too little."""
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
    """The replicas of the mask `among` with a cached prefix of the prompt, longest prefix first; at
    most _MOST_COMPARED.
    """
    start = candidates.turn % candidates.pool.size
    masks = (mask & among for _, mask in candidates.cached.levels)
    turned = (one for mask in masks for one in _turned(mask, start))
    return islice(turned, _MOST_COMPARED)


def _turned(mask: int, start: int) -> Iterator[int]:
    """The numbers of the set bits, ascending from `start`, and then those below `start`."""
    later = mask >> start << start
    yield from bits(later)
    yield from bits(mask & ~later)
