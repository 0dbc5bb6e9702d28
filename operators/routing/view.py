"""The state of a router: the replicas that it chooses from, as immutable values."""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import msgspec
from immutables import Map
from msgspec.structs import replace

from sagellm.runtime.containers import MinTree
from sagellm.runtime.feedback import FirstToken, LoadReported
from sagellm.runtime.forecast import UNKNOWN_SPEED, Forecast, ReplicaSpeed
from sagellm.runtime.messages import Request
from sagellm.runtime.port import EngineLoad
from sagellm.runtime.prefixes import PrefixIndex

Replica = tuple[str, int]  # the name of a pool, and the number of a replica in it

_SMOOTHING = 1 / 16  # weight of the latest request in the mean size of requests
_DRIFT = 1.25  # the mean may change by this factor before all loads are computed again


def tokens_of(request: Request) -> int:
    """The most tokens that a replica may have to compute for a request."""
    return request.num_uncached_tokens + request.sampling.max_tokens


class ReplicaView(msgspec.Struct, frozen=True):
    """The state of one replica, as the router knows it.

    `num_held`, `num_tokens`: the requests that this router sent to the replica and their tokens,
    until their credit is returned or they end on the way. `num_left`: the number of further
    requests that the replica has credit for.
    """

    num_held: int = 0
    num_tokens: int = 0
    num_left: float = math.inf
    num_pending: int = 0  # prompt tokens to compute: as last reported, and of requests sent since
    num_reported: int = 0  # requests that its engine reports as running or waiting
    reporter: tuple[str, int] = ("", 0)  # the node of the last report, and the report's number
    is_up: bool = True
    is_removed: bool = False
    speed: ReplicaSpeed = UNKNOWN_SPEED  # measured if the strategy subscribes to "first_token"

    @property
    def num_requests(self) -> int:
        """The requests at the replica, as this router counts them or as the engine reports them;
        the larger of both.
        """
        return max(self.num_held, self.num_reported)

    def load(self, request_tokens: float) -> float:
        """The outstanding tokens. Each reported request that this router did not send counts
        `request_tokens` tokens.
        """
        num_foreign = self.num_reported - self.num_held
        return (
            self.num_tokens + num_foreign * request_tokens if num_foreign > 0 else self.num_tokens
        )

    def holding(
        self, number: int, num_tokens: int, num_left: float, num_uncached: int = 0
    ) -> "ReplicaView":
        """The view after `number` requests with `num_tokens` tokens were added (negative: removed).

        `num_left`: the credit afterwards. `num_uncached`: the added prompt tokens to compute. A
        removed request was counted in the last report, so `num_reported` falls, too.
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
            self.speed,
        )


NEW = ReplicaView()
Score: TypeAlias = Callable[[ReplicaView], float]


@dataclass(frozen=True, slots=True)
class ReplicaPool:
    """The replicas of one engine, and the operators `nodes` that use the engine.

    `num_replicas`: the number at the start; a Topology may add replicas. `entries`: the operators
    among `nodes` that requests enter directly after the router; only their credit matters to it.
    `engine`: their engine; empty: that of the same name as the pool.
    """

    name: str
    num_replicas: int
    nodes: tuple[str, ...]
    entries: tuple[str, ...] = ()
    engine: str = ""

    @property
    def engine_name(self) -> str:
        return self.engine or self.name


class PoolView(msgspec.Struct, frozen=True):
    """The state of all replicas of one pool, as the router knows it.

    `free`, `up` and `known` are masks with a bit for each replica. With masks, an update and the
    search for the least loaded replica take microseconds for any number of replicas.
    """

    size: int  # the number of replicas, removed replicas included
    replicas: Map[int, ReplicaView] = Map()
    free: int = 0  # up, and with room for a request
    up: int = 0
    known: int = 0  # not removed
    loads: MinTree = MinTree()  # the outstanding tokens of free replicas; infinity for all others
    request_tokens: float = 1.0  # the assumed tokens of a request that another router sent
    mean_tokens: float = 0.0  # the mean over the requests placed by this router
    index: PrefixIndex | None = None  # the cached prefix blocks; None: engines do not report them
    score: Score | None = None  # of the strategy
    scores: MinTree = MinTree()  # the scores of free replicas; infinity for all others

    @classmethod
    def opened(cls, size: int, score: Score | None = None) -> "PoolView":
        return cls(0, score=score).grown(size)

    def grown(self, size: int) -> "PoolView":
        """The view with new replicas added, up to `size` replicas."""
        pool = self
        for number in range(self.size, size):
            pool = replace(pool, size=number + 1).with_replica(number, NEW)
        return pool

    def with_replica(
        self, number: int, view: ReplicaView, mean_tokens: float | None = None
    ) -> "PoolView":
        bit, free, scores = 1 << number, self.free, self.scores
        is_up = view.is_up and not view.is_removed
        if is_up and view.num_left >= 1:
            load, free = view.load(self.request_tokens), free | bit
        else:
            load, free = math.inf, free & ~bit
        if self.score is not None:
            score = self.score(view) if free & bit else math.inf
            scores = scores.with_value(number, score)
        return PoolView(
            self.size,
            self.replicas.set(number, view),
            free,
            self.up | bit if is_up else self.up & ~bit,
            self.known & ~bit if view.is_removed else self.known | bit,
            self.loads.with_value(number, load),
            self.request_tokens,
            self.mean_tokens if mean_tokens is None else mean_tokens,
            self.index,
            self.score,
            scores,
        )

    def placed(self, number: int, num_tokens: int, num_uncached: int) -> "PoolView":
        """The view after a request with `num_tokens` tokens, `num_uncached` of them uncached prompt
        tokens, was sent to replica `number`.
        """
        mean = self.mean_tokens
        mean = mean + (num_tokens - mean) * _SMOOTHING if mean else float(num_tokens)
        view = self.replicas[number]
        view = view.holding(1, num_tokens, view.num_left - 1, num_uncached)
        pool = self.with_replica(number, view, mean)
        if not 1 / _DRIFT <= self.request_tokens / mean <= _DRIFT:
            return pool.with_request_tokens(mean)
        return pool

    def with_request_tokens(self, request_tokens: float) -> "PoolView":
        """The view with all loads computed again for another mean size of requests."""
        pool = replace(self, request_tokens=request_tokens)
        for number, view in self.replicas.items():
            pool = pool.with_replica(number, view)
        return pool

    @property
    def candidates(self) -> int:
        """The mask of replicas to choose from: the free replicas, else the replicas that are up,
        else all that are not removed. In the last two cases the request waits.
        """
        return self.free or self.up or self.known


def nth_bit(mask: int, index: int) -> int:
    """The number of the set bit with exactly `index` set bits below it."""
    low, high = 0, mask.bit_length()
    while high - low > 1:
        middle = (low + high) // 2
        num_below = (mask & ((1 << middle) - 1)).bit_count()
        low, high = (middle, high) if num_below <= index else (low, middle)
    return low


def bits(mask: int) -> Iterator[int]:
    """The numbers of the set bits, ascending."""
    while mask:
        low = mask & -mask
        yield low.bit_length() - 1
        mask ^= low


def turned(mask: int, start: int) -> Iterator[int]:
    """The numbers of the set bits, ascending from `start`, and then those below `start`."""
    later = mask >> start << start
    yield from bits(later)
    yield from bits(mask & ~later)


# By request id: the replicas of all choices of the request, each with the tokens counted there.
Placed: TypeAlias = Map[str, tuple[tuple[Replica, int], ...]]


class RouterView(msgspec.Struct, frozen=True):
    """The state of a router. `placed`: the requests that have not ended. `states`: the strategy's
    states, by pool. `forecast`: updated only if the strategy subscribes to "first_token".
    """

    pools: Mapping[str, PoolView]
    num_routed: int = 0
    placed: Placed = Map()
    states: Mapping[str, Any] = {}
    forecast: Forecast = Forecast()

    @classmethod
    def of(cls, pools: tuple[ReplicaPool, ...], strategy: Any = None) -> "RouterView":
        """The view at the start, with the `initial` and `score` of a strategy that has them."""
        initial, score = getattr(strategy, "initial", None), getattr(strategy, "score", None)
        opened = {pool.name: PoolView.opened(pool.num_replicas, score) for pool in pools}
        return cls(opened, states=dict.fromkeys(opened, initial))

    def replica(self, replica: Replica) -> ReplicaView:
        return self.pools[replica[0]].replicas.get(replica[1], NEW)

    def place(self, request: Request, replicas: tuple[Replica, ...]) -> "RouterView":
        """The view after one choice of a request was sent to `replicas`, one in each pool."""
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
        """The view after a replica returned the credit of one choice of a request.

        `num_left`: the replica's credit afterwards; None: unchanged.
        """
        known, placed = self.replica(replica), self.placed
        left = known.num_left if num_left is None else num_left
        for place, (where, num_tokens) in enumerate(placed.get(request_id, ())):
            if where == replica:
                placed = _without(placed, request_id, place)
                return self._with(replica, known.holding(-1, -num_tokens, left), placed)
        return self._with(replica, known.holding(0, 0, left), placed)

    def forget(self, request_id: str) -> "RouterView":
        """The view without a request that has ended: its choices count at no replica any more."""
        view = self
        while where := view.placed.get(request_id):
            view = view.take_back(where[0][0], request_id)
        return view

    def report(self, replica: Replica, node: str, sequence: int, load: EngineLoad) -> "RouterView":
        """The view with a replica's reported load. A report that is older than the last report of
        the same node is ignored.
        """
        known = self.replica(replica)
        if known.reporter[0] == node and sequence <= known.reporter[1]:
            return self
        num_reported = load.num_running + load.num_waiting
        reported = replace(
            known,
            num_reported=num_reported,
            num_pending=load.num_pending_prefill_tokens,
            reporter=(node, sequence),
        )
        return self._with(replica, reported)

    def mark(self, replica: Replica, *, is_up: bool) -> "RouterView":
        """The view after an engine replica was lost or came back. In both cases the engine holds no
        requests, so the reported load becomes zero. Its speed is measured again.
        """
        known = replace(
            self.replica(replica),
            is_up=is_up,
            num_pending=0,
            num_reported=0,
            reporter=("", 0),
            speed=UNKNOWN_SPEED,
        )
        return self._with(replica, known)

    def measured(
        self, replica: Replica, happened: FirstToken | LoadReported, now: float
    ) -> "RouterView":
        """The view with the speed of a replica, and the forecast, updated by its feedback."""
        known = self.replica(replica)
        measured = replace(known, speed=known.speed.after(happened, now))
        return replace(self._with(replica, measured), forecast=self.forecast.after(happened, now))

    def with_index(self, pool: str, index: PrefixIndex) -> "RouterView":
        """The view with the reported prefix blocks of a pool's replicas."""
        return replace(self, pools={**self.pools, pool: replace(self.pools[pool], index=index)})

    def resize(self, pool: str, size: int, removed: frozenset[Replica]) -> "RouterView":
        """The view after a Topology: the pool has `size` replicas, including those in `removed`."""
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
    """`placed` without the entry number `place` of a request."""
    where = placed[request_id]
    if len(where) == 1:
        return placed.delete(request_id)
    return placed.set(request_id, where[:place] + where[place + 1 :])
