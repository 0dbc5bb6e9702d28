"""What a router knows of the replicas that it chooses over, as a value."""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TypeAlias

import msgspec
from immutables import Map
from msgspec.structs import replace

from sagellm.runtime.messages import Request
from sagellm.runtime.min_tree import MinTree
from sagellm.runtime.port import EngineLoad

Replica = tuple[str, int]  # a pool (an engine, or a node without one) and a number in it

_SMOOTHING = 1 / 16  # of the latest request in the mean size of requests
_DRIFT = 1.25  # how far that mean may move before all loads are computed anew


def tokens_of(request: Request) -> int:
    """What a request may cost a replica: its prompt to compute, and its answer at the longest."""
    return request.num_uncached_tokens + request.sampling.max_tokens


class ReplicaView(msgspec.Struct, frozen=True):
    """What a router knows of one replica.

    `num_held`, `num_tokens`: of the requests that this router sent there, until their credit comes
    back, or they end on their way. `num_left`: requests that its credit has room for.
    """

    num_held: int = 0
    num_tokens: int = 0
    num_left: float = math.inf
    num_reported: int = 0  # requests running and waiting in its engine
    reporter: tuple[str, int] = ("", 0)  # who reported that, and the report's number
    is_up: bool = True
    is_removed: bool = False

    def load(self, request_tokens: float) -> float:
        """Outstanding tokens; each request of others counts `request_tokens`."""
        num_foreign = self.num_reported - self.num_held
        return (
            self.num_tokens + num_foreign * request_tokens if num_foreign > 0 else self.num_tokens
        )

    def holding(self, number: int, num_tokens: int, num_left: float) -> "ReplicaView":
        """With so many more requests, or fewer, of so many tokens, and room for others."""
        return ReplicaView(
            self.num_held + number,
            self.num_tokens + num_tokens,
            num_left,
            self.num_reported,
            self.reporter,
            self.is_up,
            self.is_removed,
        )


NEW = ReplicaView()


@dataclass(frozen=True, slots=True)
class Pool:
    """The replicas to choose over: those of one engine, whichever operators use it.

    `num_replicas`: at first; a topology may say more. `entries`: of the operators, those that
    requests enter next, so that their credit decides.
    """

    name: str
    num_replicas: int
    nodes: tuple[str, ...]
    entries: tuple[str, ...] = ()


class PoolView(msgspec.Struct, frozen=True):
    """The replicas of one pool. Masks have a bit a replica: whatever their number, an update takes
    microseconds, and so does finding the least loaded.
    """

    size: int  # how many replicas it has had
    replicas: Map[int, ReplicaView] = Map()
    free: int = 0  # up, and with room
    up: int = 0
    known: int = 0  # not removed
    loads: MinTree = MinTree()  # of those that are free
    request_tokens: float = 1.0  # what a request of others counts as
    mean_tokens: float = 0.0  # of the requests that were placed

    @classmethod
    def opened(cls, size: int) -> "PoolView":
        return cls(0).grown(size)

    def grown(self, size: int) -> "PoolView":
        """With all replicas below `size`."""
        pool = self
        for number in range(self.size, size):
            pool = replace(pool, size=number + 1).with_replica(number, NEW)
        return pool

    def with_replica(
        self, number: int, view: ReplicaView, mean_tokens: float | None = None
    ) -> "PoolView":
        bit, free, loads = 1 << number, self.free, self.loads
        if view.is_up and view.num_left >= 1:
            load, free = view.load(self.request_tokens), free | bit
        else:
            load, free = math.inf, free & ~bit
        if loads[number] != load:
            loads = loads.with_value(number, load)
        return PoolView(
            self.size,
            self.replicas.set(number, view),
            free,
            self.up | bit if view.is_up else self.up & ~bit,
            self.known & ~bit if view.is_removed else self.known | bit,
            loads,
            self.request_tokens,
            self.mean_tokens if mean_tokens is None else mean_tokens,
        )

    def placed(self, number: int, num_tokens: int) -> "PoolView":
        mean = self.mean_tokens
        mean = mean + (num_tokens - mean) * _SMOOTHING if mean else float(num_tokens)
        view = self.replicas[number]
        view = view.holding(1, num_tokens, view.num_left - 1)
        pool = self.with_replica(number, view, mean)
        if not 1 / _DRIFT <= self.request_tokens / mean <= _DRIFT:
            return pool.with_request_tokens(mean)
        return pool

    def with_request_tokens(self, request_tokens: float) -> "PoolView":
        """All loads computed anew: requests are of another size than before."""
        pool = replace(self, request_tokens=request_tokens)
        for number, view in self.replicas.items():
            pool = pool.with_replica(number, view)
        return pool

    @property
    def candidates(self) -> int:
        """The mask of those to choose from: free ones, else those that are up, else those that may
        come back; at the last two a request waits.
        """
        return self.free or self.up or self.known


Placed: TypeAlias = Map[str, tuple[tuple[Replica, int], ...]]


class View(msgspec.Struct, frozen=True):
    """The state of a router. `placed`: request -> where its choices went, and their tokens."""

    pools: Mapping[str, PoolView]
    num_routed: int = 0
    placed: Placed = Map()

    @classmethod
    def of(cls, pools: tuple[Pool, ...]) -> "View":
        return cls({pool.name: PoolView.opened(pool.num_replicas) for pool in pools})

    def replica(self, replica: Replica) -> ReplicaView:
        return self.pools[replica[0]].replicas.get(replica[1], NEW)

    def load(self, replica: Replica, request: Request) -> float:
        """Outstanding tokens; a request of others counts as much as the one in hand."""
        return self.replica(replica).load(tokens_of(request))

    def place(self, request: Request, replicas: tuple[Replica, ...]) -> "View":
        num_tokens = tokens_of(request)
        pools = dict(self.pools)
        for pool, number in replicas:
            pools[pool] = pools[pool].placed(number, num_tokens)
        where = self.placed.get(request.request_id, ())
        where += tuple([(replica, num_tokens) for replica in replicas])
        placed = self.placed.set(request.request_id, where)
        return View(pools, self.num_routed + 1, placed)

    def take_back(self, replica: Replica, request_id: str, num_left: float | None = None) -> "View":
        """A replica holds a choice of a request no more; `num_left`: where requests enter it."""
        known, placed = self.replica(replica), self.placed
        left = known.num_left if num_left is None else num_left
        for place, (where, num_tokens) in enumerate(placed.get(request_id, ())):
            if where == replica:
                placed = _without(placed, request_id, place)
                return self._with(replica, known.holding(-1, -num_tokens, left), placed)
        return self._with(replica, known.holding(0, 0, left), placed)

    def forget(self, request_id: str) -> "View":
        """Its last event has passed: whatever it took is free."""
        view = self
        while where := view.placed.get(request_id):
            view = view.take_back(where[0][0], request_id)
        return view

    def report(self, replica: Replica, node: str, sequence: int, load: EngineLoad) -> "View":
        """The latest load wins; one that a later one of its node overtook changes nothing."""
        known = self.replica(replica)
        if known.reporter[0] == node and sequence <= known.reporter[1]:
            return self
        num_reported = load.num_running + load.num_waiting
        heard = replace(known, num_reported=num_reported, reporter=(node, sequence))
        return self._with(replica, heard)

    def mark(self, replica: Replica, *, is_up: bool) -> "View":
        """Its engine is back, or is lost: either way without what it had."""
        known = replace(self.replica(replica), is_up=is_up, num_reported=0, reporter=("", 0))
        return self._with(replica, known)

    def resize(self, pool: str, size: int, removed: frozenset[Replica]) -> "View":
        """As a topology says."""
        grown = self.pools[pool].grown(size)
        for number, known in grown.replicas.items():
            is_removed = (pool, number) in removed
            if is_removed != known.is_removed:
                grown = grown.with_replica(number, replace(known, is_removed=is_removed))
        return replace(self, pools={**self.pools, pool: grown})

    def _with(self, replica: Replica, known: ReplicaView, placed: Placed | None = None) -> "View":
        name, number = replica
        pool = self.pools[name]
        if number >= pool.size:
            pool = pool.grown(number + 1)
        pools = {**self.pools, name: pool.with_replica(number, known)}
        return View(pools, self.num_routed, self.placed if placed is None else placed)


def _without(placed: Placed, request_id: str, place: int) -> Placed:
    """Without one of the places of a request."""
    where = placed[request_id]
    if len(where) == 1:
        return placed.delete(request_id)
    return placed.set(request_id, where[:place] + where[place + 1 :])


@dataclass(frozen=True, slots=True)
class Candidates:
    """The replicas of one pool that a strategy orders for one request."""

    pool: PoolView
    request: Request
    turn: int  # rises by one with each request that was routed

    @property
    def numbers(self) -> tuple[int, ...]:
        """All candidates, ascending. Linear in their number."""
        return tuple(bits(self.pool.candidates))

    @property
    def mask(self) -> int:
        """The same as a mask: bit n is set where replica n is a candidate."""
        return self.pool.candidates

    def load(self, number: int) -> float:
        """Outstanding tokens of a replica."""
        return self.pool.replicas[number].load(tokens_of(self.request))

    def least_loaded(self) -> int:
        """Ties go round, so that an idle pool fills evenly."""
        start = self.turn % self.pool.size
        found = self.pool.loads.argmin(start)
        return found if found is not None else min(self.numbers, key=self._waiting_rank(start))

    def by_load(self) -> Iterator[int]:
        """The candidates, least loaded first; the first comes at once, the others are sorted."""
        first = self.least_loaded()
        yield first
        rank = self._waiting_rank(self.turn % self.pool.size)
        yield from sorted((number for number in self.numbers if number != first), key=rank)

    def rest(self, tried: int) -> Iterator[int]:
        """The candidates that are not in the mask `tried`, least loaded first."""
        if tried != self.mask:
            yield from (number for number in self.by_load() if not tried >> number & 1)

    def _waiting_rank(self, start: int) -> Callable[[int], tuple[float, int]]:
        size = self.pool.size
        return lambda number: (self.load(number), (number - start) % size)


def nth_bit(mask: int, index: int) -> int:
    """The number of the bit that is set with `index` set bits below it."""
    low, high = 0, mask.bit_length()
    while high - low > 1:
        middle = (low + high) // 2
        num_below = (mask & ((1 << middle) - 1)).bit_count()
        low, high = (middle, high) if num_below <= index else (low, middle)
    return low


def bits(mask: int) -> Iterator[int]:
    """The numbers of the bits that are set, ascending."""
    while mask:
        low = mask & -mask
        yield low.bit_length() - 1
        mask ^= low
