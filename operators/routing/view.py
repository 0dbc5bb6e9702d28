"""What a router knows of all replicas that it chooses over, as a value."""

from collections.abc import Mapping
from typing import Any, TypeAlias

import msgspec
from immutables import Map
from msgspec.structs import replace

from sagellm.operators.routing.replicas import (
    NEW,
    Pool,
    PoolView,
    Replica,
    ReplicaView,
    tokens_of,
)
from sagellm.runtime.forecast import Forecast
from sagellm.runtime.messages import Request
from sagellm.runtime.port import EngineLoad
from sagellm.runtime.prefixes import PrefixIndex

Placed: TypeAlias = Map[str, tuple[tuple[Replica, int], ...]]


class View(msgspec.Struct, frozen=True):
    """The state of a router. `placed`: request -> where its choices went, and their tokens.
    `states`: of the strategy, by pool. `forecast`: where the strategy wants one.
    """

    pools: Mapping[str, PoolView]
    num_routed: int = 0
    placed: Placed = Map()
    states: Mapping[str, Any] = {}
    forecast: Forecast = Forecast()

    @classmethod
    def of(cls, pools: tuple[Pool, ...]) -> "View":
        return cls({pool.name: PoolView.opened(pool.num_replicas) for pool in pools})

    def replica(self, replica: Replica) -> ReplicaView:
        return self.pools[replica[0]].replicas.get(replica[1], NEW)

    def load(self, replica: Replica, request: Request) -> float:
        """Outstanding tokens; a request of others counts as much as the one in hand."""
        return self.replica(replica).load(tokens_of(request))

    def place(self, request: Request, replicas: tuple[Replica, ...]) -> "View":
        num_uncached = request.num_uncached_tokens
        num_tokens = num_uncached + request.sampling.max_tokens
        pools = dict(self.pools)
        for pool, number in replicas:
            pools[pool] = pools[pool].placed(number, num_tokens, num_uncached)
        where = self.placed.get(request.request_id, ())
        where += tuple([(replica, num_tokens) for replica in replicas])
        placed = self.placed.set(request.request_id, where)
        return View(pools, self.num_routed + 1, placed, self.states, self.forecast)

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
        heard = replace(
            known,
            num_reported=num_reported,
            num_pending=load.num_pending_prefill_tokens,
            reporter=(node, sequence),
        )
        return self._with(replica, heard)

    def mark(self, replica: Replica, *, is_up: bool) -> "View":
        """Its engine is back, or is lost: either way without what it had."""
        known = replace(
            self.replica(replica), is_up=is_up, num_pending=0, num_reported=0, reporter=("", 0)
        )
        return self._with(replica, known)

    def with_index(self, pool: str, index: PrefixIndex) -> "View":
        """As the engine of a pool says which prefix blocks its replicas have."""
        return replace(self, pools={**self.pools, pool: replace(self.pools[pool], index=index)})

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
        placed = self.placed if placed is None else placed
        return View(pools, self.num_routed, placed, self.states, self.forecast)


def _without(placed: Placed, request_id: str, place: int) -> Placed:
    """Without one of the places of a request."""
    where = placed[request_id]
    if len(where) == 1:
        return placed.delete(request_id)
    return placed.set(request_id, where[:place] + where[place + 1 :])
