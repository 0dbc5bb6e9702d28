"""What a router knows of the replicas that it chooses over, as a value."""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import msgspec
from immutables import Map
from msgspec.structs import replace

from sagellm.runtime.engine.port import EngineLoad
from sagellm.runtime.messages import Request
from sagellm.runtime.min_tree import MinTree

Replica = tuple[str, int]  # a pool (an engine, or a node without one) and a number in it

_SMOOTHING = 1 / 16  # of the latest request in the mean size of requests
_DRIFT = 1.25  # how far that mean may move before all loads are computed anew


def tokens_of(request: Request) -> int:
    """What a request may cost a replica: its prompt to compute, and its answer at the longest."""
    return request.num_uncached_tokens + request.sampling.max_tokens


class ReplicaView(msgspec.Struct, frozen=True):
    """What a router knows of one replica. `num_left`: requests that its credit has room for.

    `num_open`, `num_tokens`: of requests that this router sent there and that have not ended.
    `num_held`: of these, less the credits that came back. A prefill returns its credit long before
    the request ends; a request that ends on its way never had credit here, so this count may be
    too high, never too low. `reports`: by operator, the number of its last report.
    """

    num_open: int = 0
    num_tokens: int = 0
    num_held: int = 0
    num_left: float = math.inf
    num_reported: int = 0  # requests running and waiting in its engine
    reporter: tuple[str, int] = ("", 0)  # who said so, and its report's number
    is_up: bool = True
    is_removed: bool = False

    @property
    def own_load(self) -> float:
        """Outstanding tokens of this router's requests, as far as the replica still holds them."""
        return self.num_tokens * min(self.num_held, self.num_open) / max(self.num_open, 1)

    def load(self, request_tokens: float) -> float:
        """Outstanding tokens; each request of others counts `request_tokens`."""
        num_foreign = self.num_reported - self.num_held
        return self.own_load + max(num_foreign, 0) * request_tokens

    def placed(self, num_tokens: int) -> "ReplicaView":
        return replace(
            self,
            num_open=self.num_open + 1,
            num_tokens=self.num_tokens + num_tokens,
            num_held=self.num_held + 1,
            num_left=self.num_left - 1,
        )

    def forgotten(self, num_tokens: int) -> "ReplicaView":
        """A request has ended. With none open none is held: errors of the count end here."""
        if self.num_open == 1:
            return replace(self, num_open=0, num_tokens=0, num_held=0)
        return replace(self, num_open=self.num_open - 1, num_tokens=self.num_tokens - num_tokens)

    def returned(self, num_left: float | None) -> "ReplicaView":
        num_held = max(self.num_held - 1, 0)
        return replace(
            self, num_held=num_held, num_left=self.num_left if num_left is None else num_left
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

    def with_replica(self, number: int, view: ReplicaView) -> "PoolView":
        bit = 1 << number
        is_free = view.is_up and view.num_left >= 1
        load = view.load(self.request_tokens) if is_free else math.inf
        return PoolView(
            self.size,
            self.replicas.set(number, view),
            self.free | bit if is_free else self.free & ~bit,
            self.up | bit if view.is_up else self.up & ~bit,
            self.known & ~bit if view.is_removed else self.known | bit,
            self.loads if self.loads[number] == load else self.loads.with_value(number, load),
            self.request_tokens,
            self.mean_tokens,
        )

    def placed(self, number: int, num_tokens: int) -> "PoolView":
        mean = self.mean_tokens + (num_tokens - self.mean_tokens) * _SMOOTHING
        pool = replace(self, mean_tokens=mean if self.mean_tokens else float(num_tokens))
        pool = pool.with_replica(number, self.replicas[number].placed(num_tokens))
        if not 1 / _DRIFT <= pool.request_tokens / pool.mean_tokens <= _DRIFT:
            return pool.with_request_tokens(pool.mean_tokens)
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


class View(msgspec.Struct, frozen=True):
    """The state of a router. `placed`: request -> where its choices went, and their tokens."""

    pools: Mapping[str, PoolView]
    num_routed: int = 0
    placed: Map[str, tuple[tuple[Replica, int], ...]] = Map()

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
        where += tuple((replica, num_tokens) for replica in replicas)
        placed = self.placed.set(request.request_id, where)
        return View(pools, self.num_routed + 1, placed)

    def forget(self, request_id: str) -> "View":
        """Its last event has passed: whatever it took is free."""
        where = self.placed.get(request_id)
        if where is None:
            return self
        view = replace(self, placed=self.placed.delete(request_id))
        for replica, num_tokens in where:
            view = view._with(replica, view.replica(replica).forgotten(num_tokens))
        return view

    def take_back(self, replica: Replica, num_left: float | None) -> "View":
        """A replica returned the credit of one request; `num_left`: where requests enter it."""
        return self._with(replica, self.replica(replica).returned(num_left))

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

    def _with(self, replica: Replica, known: ReplicaView) -> "View":
        name, number = replica
        pool = self.pools[name].grown(number + 1).with_replica(number, known)
        return View({**self.pools, name: pool}, self.num_routed, self.placed)


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
