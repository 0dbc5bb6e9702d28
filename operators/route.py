"""route: chooses a replica for every engine operator downstream, the (prefill, decode) pair.

The strategy orders the replicas that are up and have room; the first that has credit for the
request takes it. While one has, nothing waits.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import msgspec

from sagellm.graphs.vocabulary import REQUEST, OpSpec, Port
from sagellm.operators.routing import Strategy, find_strategy
from sagellm.operators.routing.view import Candidates, Pool, PoolView, Replica, View, bits
from sagellm.runtime.feedback import CreditChanged, HealthChanged, LoadReported, Topology
from sagellm.runtime.messages import Request
from sagellm.runtime.operator import (
    Arrival,
    Draw,
    EmitFirst,
    Input,
    Setup,
    Signal,
    Step,
    Target,
    Wait,
)
from sagellm.runtime.user_code import WrongResult, kind_of, place_of_code


@dataclass(frozen=True, slots=True)
class Options:
    """How to choose: `strategy` is a file of that name in `operators/routing`, or registered."""

    strategy: str = field(default="load_balanced", metadata={"names": "strategies"})


SPEC = OpSpec(
    "route",
    (Port("in", REQUEST),),
    (Port("out", REQUEST),),
    options=Options,
    subscribes=frozenset({"credit", "load", "health", "topology"}),
    signals=frozenset({"forget"}),
)


@dataclass(frozen=True, slots=True)
class Route:
    """Chooses for the whole path at once: decode's blocks are reserved before prefill starts.

    Operators that share an engine get the same replica of it. Where no target is replicated the
    request passes with each placed on replica 0.
    """

    pools: tuple[Pool, ...]
    strategy: Strategy
    entry: Pool | None = None  # the one pool that requests enter next, if it is one
    by_node: Mapping[str, Pool] = field(default_factory=dict)

    @property
    def initial(self) -> View:
        return View.of(self.pools)

    def on(self, state: View, happened: Input, now: float, draw: Draw) -> Step[View]:
        match happened:
            case Arrival(item=Request() as request):
                if self.entry is not None and not state.pools[self.entry.name].free:
                    return Step(state, (Wait(self.entry.entries[0]),))
                if request.avoid:
                    return self._place_elsewhere(state, request)
                return Step(state, (EmitFirst(self._placements(state, request, now, draw)),))
            case Signal(kind="forget", request_id=request_id):
                return Step(state.forget(request_id))
            case Topology(num_replicas=sizes, removed=removed):
                for pool in self.pools:
                    state = state.resize(pool.name, sizes.get(pool.name, 1), removed)
                return Step(state)
            case CreditChanged() | LoadReported() | HealthChanged():
                of = self.by_node.get(happened.node)
                return Step(state if of is None else _told(state, of, happened))
        return Step(state)

    def keeps(self, state: View, request_id: str) -> bool:
        return request_id in state.placed

    def _placements(
        self, view: View, request: Request, now: float, draw: Draw
    ) -> Iterator[tuple[Request, View]]:
        """The request with its replicas, best first, each with the view that follows."""
        best: dict[Pool, int] = {}
        others: dict[Pool, Iterator[int]] = {}
        for pool in self.pools:
            candidates = Candidates(view.pools[pool.name], request, view.num_routed)
            returned: Any = self.strategy(candidates, now, draw)
            if type(returned) is int and returned >= 0 and candidates.mask >> returned & 1:
                best[pool] = returned  # nearly always
                others[pool] = candidates.rest(1 << returned)
            else:
                others[pool] = self._order(pool, candidates, returned)
                best[pool] = next(others[pool])
        yield _placed(view, request, best)
        for pool, order in others.items():
            for number in order if pool.entries else ():
                yield _placed(view, request, {**best, pool: number})

    def _place_elsewhere(self, view: View, request: Request) -> Step[View]:
        """Place a request that engines failed on: on another replica, by load, whatever the
        strategy. It waits for one that has room; only where no other is up does it go back.
        """
        chosen: dict[Pool, int] = {}
        for pool in self.pools:
            known = view.pools[pool.name]
            avoided = sum(1 << number for name, number in request.avoid if name == pool.name)
            if pool.entries and known.up & ~avoided and not known.free & ~avoided:
                return Step(view, (Wait(pool.entries[0]),))
            usable = known.free & ~avoided or known.up & ~avoided or known.candidates
            load = Candidates(known, request, view.num_routed).load
            chosen[pool] = min(bits(usable), key=load)
        return Step(view, (EmitFirst((_placed(view, request, chosen),)),))

    def _order(self, pool: Pool, candidates: Candidates, returned: Any) -> Iterator[int]:
        """The candidates as the strategy returned them, one or several; then those that it left
        out, by their load.
        """
        is_order = isinstance(returned, Iterable) and not isinstance(returned, str)
        tried = 0
        for number in returned if is_order else (returned,):
            self._check(pool, candidates.pool, number)
            if candidates.mask >> number & ~(tried >> number) & 1:
                tried |= 1 << number
                yield number
        yield from candidates.rest(tried)

    def _check(self, pool: Pool, known: PoolView, number: object) -> None:
        """Raises WrongResult for what is no replica of the pool, or one that was removed."""
        if type(number) is not int or not 0 <= number < known.size:
            said = number if type(number) is int else kind_of(number)
            raise self._wrong(f"{said}; a replica of {pool.name}, 0 to {known.size - 1},")
        if known.replicas[number].is_removed:
            said = f"{number}, a replica of {pool.name} that was removed"
            raise self._wrong(f"{said}; one of candidates.numbers")

    def _wrong(self, text: str) -> WrongResult:
        code = place_of_code(self.strategy)
        return WrongResult(f"the strategy returned {text} was wanted", code)


def _told(view: View, pool: Pool, told: CreditChanged | LoadReported | HealthChanged) -> View:
    """The view after feedback about a replica of a pool."""
    replica: Replica = pool.name, told.replica
    match told:
        case CreditChanged(request_id=request_id, num_left=num_left):
            left = num_left if told.node in pool.entries else None
            return view.take_back(replica, request_id, left)
        case LoadReported(load=load):
            return view.report(replica, told.node, told.sequence, load)
        case HealthChanged(is_up=is_up):
            return view.mark(replica, is_up=is_up)


def _placed(view: View, request: Request, chosen: dict[Pool, int]) -> tuple[Request, View]:
    placement, where = {**request.placement}, []
    for pool, number in chosen.items():
        where.append((pool.name, number))
        for node in pool.nodes:
            placement[node] = number
    placed = msgspec.structs.replace(request, placement=placement)
    return placed, view.place(request, tuple(where))


def pools_of(targets: tuple[Target, ...]) -> tuple[Pool, ...]:
    """The targets by engine; one without an engine is a pool of its own."""
    named: dict[str, list[Target]] = {}
    for target in targets:
        named.setdefault(target.engine or target.node, []).append(target)
    return tuple(
        Pool(
            name,
            members[0].num_replicas,
            tuple(target.node for target in members),
            tuple(target.node for target in members if target.is_next),
        )
        for name, members in named.items()
    )


def build(options: Options, setup: Setup) -> Route:
    pools = pools_of(setup.targets)
    entries = [pool for pool in pools if pool.entries]
    entry = entries[0] if len(entries) == 1 else None
    by_node = {node: pool for pool in pools for node in pool.nodes}
    return Route(pools, find_strategy(options.strategy), entry, by_node)
