"""The shipped strategies of `route`. Their table is `STRATEGIES` of `sagellm.operators.routing`."""

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import msgspec
from immutables import Map

from sagellm.operators.routing.strategy import Candidates, Order
from sagellm.operators.routing.view import bits, nth_bit
from sagellm.runtime.containers import MinTree
from sagellm.runtime.operator import Draw

_MOST_COMPARED = 16  # the most replicas of one affinity that TopologyAware compares at a time


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


def power_of_two(candidates: Candidates, now: float, draw: Draw) -> int:
    """The less loaded of two distinct random replicas, by outstanding tokens.

    Source: Mitzenmacher, The power of two choices in randomized load balancing, 2001.
    """
    mask, num_candidates = candidates.mask, candidates.mask.bit_count()
    first = draw.below(num_candidates)
    if num_candidates == 1:
        return nth_bit(mask, first)
    second = (first + 1 + draw.below(num_candidates - 1)) % num_candidates
    one, other = nth_bit(mask, first), nth_bit(mask, second)
    return other if candidates.load(other) < candidates.load(one) else one


class _Turns(msgspec.Struct, frozen=True):
    """The state of `WeightedRoundRobin`.

    The current weight of a replica is `num_turns` * weight - offset while it is a candidate. So a
    turn, which raises all of them, changes one number. `offsets`: by weight, the offsets of the
    candidates. `paused`: the current weight of each replica that was a candidate before.
    """

    num_turns: int = 0
    mask: int = 0  # the candidates of the latest turn
    total: int = 0  # the sum of their weights
    offsets: Mapping[int, MinTree] = {}
    paused: Map[int, float] = Map()


@dataclass(frozen=True, slots=True)
class WeightedRoundRobin:
    """Each replica gets its share of the requests, by weight, evenly spread over time.

    With each request, the current weight of every candidate rises by its weight. The candidate with
    the highest current weight gets the request, and its current weight falls by the sum of all
    weights. Equal candidates: the lowest number. Weights 5, 1, 1 give 0 0 1 0 2 0 0. A replica that
    is no candidate keeps its current weight.

    `weights`: by engine, a weight for each replica; 1 for further replicas. A decision takes time
    linear in the number of different weights, and in the replicas that became candidates, or ceased
    to be, since the decision before.

    Source: smooth weighted round robin of nginx (ngx_http_upstream_round_robin.c).
    """

    weights: Mapping[str, tuple[int, ...]] = field(
        default_factory=dict, metadata={"by_engine": True}
    )

    def __post_init__(self) -> None:
        for engine, weights in self.weights.items():
            if any(weight < 1 for weight in weights):
                raise ValueError(f"`weights` of `{engine}` must be at least 1")

    @property
    def initial(self) -> _Turns:
        return _Turns()

    def order(
        self, state: _Turns, candidates: Candidates, now: float, draw: Draw
    ) -> tuple[int, _Turns]:
        state = self._with_candidates(state, candidates)
        turn, offsets = state.num_turns + 1, dict(state.offsets)
        best, best_weight, highest = -1, 0, -math.inf
        for weight, tree in offsets.items():
            number, current = tree.argmin(), turn * weight - tree.minimum
            if number is not None and (current, -number) > (highest, -best):
                best, best_weight, highest = number, weight, current
        tree = offsets[best_weight]
        offsets[best_weight] = tree.with_value(best, tree.minimum + state.total)
        return best, _Turns(turn, state.mask, state.total, offsets, state.paused)

    def _with_candidates(self, state: _Turns, candidates: Candidates) -> _Turns:
        """The state with the replicas added and removed that differ from the latest turn."""
        mask, weights = candidates.mask, self.weights.get(candidates.name, ())
        if mask == state.mask:
            return state
        offsets, paused, total = dict(state.offsets), state.paused, state.total
        for number in bits(mask ^ state.mask):
            weight = weights[number] if number < len(weights) else 1
            tree, raised = offsets.get(weight, MinTree()), state.num_turns * weight
            if mask >> number & 1:
                offset = raised - paused.get(number, 0)
                total += weight
            else:
                paused, offset = paused.set(number, raised - tree[number]), math.inf
                total -= weight
            offsets[weight] = tree.with_value(number, offset)
        return _Turns(state.num_turns, mask, total, offsets, paused)


def choose_by_key(key: str, replicas: Sequence[int]) -> int:
    """The replica with the highest hash of key and replica number, the same in every process.

    A new replica takes 1 / (n + 1) of the keys; all other keys keep their replica. If a replica is
    lost, only its own keys move. Takes 0.6 us for each replica.

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


_AFFINITIES = (1.0, 0.5, 0.1)  # same NVLink domain, same machine, same rack
_FAR = 0.01  # the affinity of all others


@dataclass(frozen=True, slots=True)
class TopologyAware:
    """Sends a request to a replica that is near, unless nearer replicas have more work left.

        cost = outstanding tokens of the replica, as `load_balanced` counts them
             + prompt tokens of the request * transfer_weight * 0.01 / affinity

    The affinity of two places is 1.0 in one NVLink domain of a machine, 0.5 on one machine, 0.1 in
    one rack and 0.01 otherwise. It stands for the bandwidth between them: a prompt that moves far
    costs as many tokens as it has, and within an NVLink domain a hundredth of them. The replica
    with the lowest cost goes first; equal replicas take turns.

    `places`: by engine, the place of each replica, as RACK, RACK/MACHINE or RACK/MACHINE/DOMAIN; an
    empty text is unknown. The place that a replica is compared with is that of the replica chosen
    for the request before (the prefill replica, where a decode replica is chosen), or else the
    place in the tag `tag` of the request. Without one, the least loaded replica is taken.
    `transfer_weight`: the cost of moving a prompt token far, in outstanding tokens.

    A decision compares the least loaded replica, and of each affinity at most 16 replicas, other
    ones each time. So its cost does not grow with the number of replicas.

    Source: the four affinities of sageLLM's topology_aware routing; its rule is not published.
    """

    places: Mapping[str, tuple[str, ...]] = field(
        default_factory=dict, metadata={"by_engine": True}
    )
    tag: str = "place"
    transfer_weight: float = field(default=1.0, metadata={"min": 0.0})

    def __post_init__(self) -> None:
        for place in (place for places in self.places.values() for place in places):
            if place and len(_parts(place)) != place.count("/") + 1:
                raise ValueError(f"`places`: {place!r} is not RACK/MACHINE/DOMAIN")

    @property
    def initial(self) -> Mapping[str, Mapping[str, int]]:
        """By engine and by place, the mask of the replicas there. Never changes."""
        masks: dict[str, dict[str, int]] = {}
        for engine, places in self.places.items():
            known = masks[engine] = dict[str, int]()
            for number, place in enumerate(places):
                for part in _parts(place):
                    known[part] = known.get(part, 0) | 1 << number
        return masks

    def order(
        self,
        state: Mapping[str, Mapping[str, int]],
        candidates: Candidates,
        now: float,
        draw: Draw,
    ) -> tuple[Order, Mapping[str, Mapping[str, int]]]:
        idlest, here = candidates.least_loaded(), self._place(candidates)
        masks = state.get(candidates.name)
        if not here or not masks:
            return idlest, state
        levels = tuple(_levels(masks, _parts(here), candidates.mask))
        affinities = {
            number: affinity
            for affinity, mask in levels
            for number in candidates.some(mask, _MOST_COMPARED)
        }
        affinities[idlest] = next(one for one, mask in levels if mask >> idlest & 1)
        return self._ranked(candidates, affinities), state

    def _ranked(self, candidates: Candidates, affinities: Mapping[int, float]) -> list[int]:
        request = candidates.request
        num_tokens = len(request.prompt_token_ids) + len(request.emitted_token_ids)
        far_cost = num_tokens * self.transfer_weight * _FAR

        def rank(number: int) -> tuple[float, int]:
            cost = candidates.load(number) + far_cost / affinities[number]
            return cost, candidates.distance(number)

        return sorted(affinities, key=rank)

    def _place(self, candidates: Candidates) -> str:
        found = candidates.request.tags.get(self.tag, "")
        for engine, number in candidates.chosen.items():
            places = self.places.get(engine, ())
            found = places[number] if number < len(places) and places[number] else found
        return found


def _parts(place: str) -> tuple[str, ...]:
    """The rack, the machine and the domain of a place, each with what it lies in: r, r/m, r/m/d.
    Ends before the first part that is empty, and after three.
    """
    names = place.split("/")[: len(_AFFINITIES)]
    known = names.index("") if "" in names else len(names)
    return tuple("/".join(names[: end + 1]) for end in range(known))


def _levels(
    masks: Mapping[str, int], parts: tuple[str, ...], among: int
) -> Iterator[tuple[float, int]]:
    """Each affinity to a place with the parts `parts`, and the mask of replicas that have it."""
    nearest = zip(_AFFINITIES[len(_AFFINITIES) - len(parts) :], reversed(parts), strict=True)
    for affinity, part in nearest:
        near = masks.get(part, 0) & among
        among &= ~near
        yield affinity, near
    yield _FAR, among
