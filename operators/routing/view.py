"""What a router knows of the replicas that it chooses over, as values."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import msgspec
from immutables import Map
from msgspec.structs import replace

from sagellm.runtime.forecast import Forecast
from sagellm.runtime.messages import Request
from sagellm.runtime.persistent import MinTree
from sagellm.runtime.port import EngineLoad
from sagellm.runtime.prefixes import PrefixIndex

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
    num_pending: int = 0  # prompt tokens to compute: as reported, and of requests sent since
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

    def holding(
        self, number: int, num_tokens: int, num_left: float, num_uncached: int = 0
    ) -> "ReplicaView":
        """With so many more requests, or fewer, of so many tokens, and room for others. Those that
        have left it were in its last report.
        """
        num_reported = self.num_reported + number if number < 0 else self.num_reported
        return ReplicaView(
            self.num_held + number,
            self.num_tokens + num_tokens,
            num_left,
            self.num_pending + num_uncached,
            num_reported if num_reported > 0 else 0,
            self.reporter,
            self.is_up,
            self.is_removed,
        )


NEW = ReplicaView()


@dataclass(frozen=True, slots=True)
class ReplicaPool:
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
    index: PrefixIndex | None = None  # of the prefix blocks that they have, if anybody asks

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
        bit, free = 1 << number, self.free
        if view.is_up and view.num_left >= 1:
            load, free = view.load(self.request_tokens), free | bit
        else:
            load, free = math.inf, free & ~bit
        return PoolView(
            self.size,
            self.replicas.set(number, view),
            free,
            self.up | bit if view.is_up else self.up & ~bit,
            self.known & ~bit if view.is_removed else self.known | bit,
            self.loads.with_value(number, load),
            self.request_tokens,
            self.mean_tokens if mean_tokens is None else mean_tokens,
            self.index,
        )

    def placed(self, number: int, num_tokens: int, num_uncached: int) -> "PoolView":
        """With one more request there, of so many tokens, and prompt tokens to compute."""
        mean = self.mean_tokens
        mean = mean + (num_tokens - mean) * _SMOOTHING if mean else float(num_tokens)
        view = self.replicas[number]
        view = view.holding(1, num_tokens, view.num_left - 1, num_uncached)
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


Placed: TypeAlias = Map[str, tuple[tuple[Replica, int], ...]]


class RouterView(msgspec.Struct, frozen=True):
    """The state of a router. `placed`: request -> where its choices went, and their tokens.
    `states`: of the strategy, by pool. `forecast`: where the strategy wants one.
    """

    pools: Mapping[str, PoolView]
    num_routed: int = 0
    placed: Placed = Map()
    states: Mapping[str, Any] = {}
    forecast: Forecast = Forecast()

    @classmethod
    def of(cls, pools: tuple[ReplicaPool, ...]) -> "RouterView":
        return cls({pool.name: PoolView.opened(pool.num_replicas) for pool in pools})

    def replica(self, replica: Replica) -> ReplicaView:
        return self.pools[replica[0]].replicas.get(replica[1], NEW)

    def load(self, replica: Replica, request: Request) -> float:
        """Outstanding tokens; a request of others counts as much as the one in hand."""
        return self.replica(replica).load(tokens_of(request))

    def place(self, request: Request, replicas: tuple[Replica, ...]) -> "RouterView":
        num_uncached = request.num_uncached_tokens
        num_tokens = num_uncached + request.sampling.max_tokens
        pools = dict(self.pools)
        for pool, number in replicas:
            pools[pool] = pools[pool].placed(number, num_tokens, num_uncached)
        where = self.placed.get(request.request_id, ())
        where += tuple([(replica, num_tokens) for replica in replicas])
        placed = self.placed.set(request.request_id, where)
        return RouterView(pools, self.num_routed + 1, placed, self.states, self.forecast)

    def take_back(
        self, replica: Replica, request_id: str, num_left: float | None = None
    ) -> "RouterView":
        """A replica holds a choice of a request no more; `num_left`: where requests enter it."""
        known, placed = self.replica(replica), self.placed
        left = known.num_left if num_left is None else num_left
        for place, (where, num_tokens) in enumerate(placed.get(request_id, ())):
            if where == replica:
                placed = _without(placed, request_id, place)
                return self._with(replica, known.holding(-1, -num_tokens, left), placed)
        return self._with(replica, known.holding(0, 0, left), placed)

    def forget(self, request_id: str) -> "RouterView":
        """Its last event has passed: whatever it took is free."""
        view = self
        while where := view.placed.get(request_id):
            view = view.take_back(where[0][0], request_id)
        return view

    def report(self, replica: Replica, node: str, sequence: int, load: EngineLoad) -> "RouterView":
        """The latest load wins; one that a later one of its node overtook changes nothing."""
        known = self.replica(replica)
        if known.reporter[0] == node and sequence <= known.reporter[1]:
            return self
        num_reported = load.num_running + load.num_waiting
        heard = replace(
            known,
            num_reported=num_reported,
            num_pending=load.num_pending_prefill_tokens,
            reporter=(node, sequence),
        )
        return self._with(replica, heard)

    def mark(self, replica: Replica, *, is_up: bool) -> "RouterView":
        """Its engine is back, or is lost: either way without what it had."""
        known = replace(
            self.replica(replica), is_up=is_up, num_pending=0, num_reported=0, reporter=("", 0)
        )
        return self._with(replica, known)

    def with_index(self, pool: str, index: PrefixIndex) -> "RouterView":
        """As the engine of a pool says which prefix blocks its replicas have."""
        return replace(self, pools={**self.pools, pool: replace(self.pools[pool], index=index)})

    def resize(self, pool: str, size: int, removed: frozenset[Replica]) -> "RouterView":
        """As a topology says."""
        grown = self.pools[pool].grown(size)
        for number, known in grown.replicas.items():
            is_removed = (pool, number) in removed
            if is_removed != known.is_removed:
                grown = grown.with_replica(number, replace(known, is_removed=is_removed))
        return replace(self, pools={**self.pools, pool: grown})

    def _with(
        self, replica: Replica, known: ReplicaView, placed: Placed | None = None
    ) -> "RouterView":
        name, number = replica
        pool = self.pools[name]
        if number >= pool.size:
            pool = pool.grown(number + 1)
        pools = {**self.pools, name: pool.with_replica(number, known)}
        placed = self.placed if placed is None else placed
        return RouterView(pools, self.num_routed, placed, self.states, self.forecast)


def _without(placed: Placed, request_id: str, place: int) -> Placed:
    """Without one of the places of a request."""
    where = placed[request_id]
    if len(where) == 1:
        return placed.delete(request_id)
    return placed.set(request_id, where[:place] + where[place + 1 :])
