"""route: chooses a replica of every engine downstream, such as a (prefill, decode) pair.

The strategy orders the replicas that are up and have room; the first replica with credit takes the
request. While a replica has credit no request waits, unless the strategy holds the request back for
another replica, for a limited time.

`num_cached_tokens` of an emitted request is the number of its prompt tokens that the chosen replica
has cached. Engines report this only if the strategy, or an earlier operator, subscribes to "cache".
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

import msgspec

from sagellm.graphs.vocabulary import REQUEST, OpSpec, Port
from sagellm.operators.routing import Candidates, Hold, Strategy, StrategyFunction, find_strategy
from sagellm.operators.routing.strategy import (
    ROUTER_FEEDBACK,
    STRATEGY_FEEDBACK,
    make_strategy,
    wanted_feedback,
)
from sagellm.operators.routing.view import PoolView, Replica, ReplicaPool, RouterView, bits
from sagellm.runtime.feedback import (
    CreditChanged,
    FirstToken,
    HealthChanged,
    LoadReported,
    PrefixesChanged,
    Topology,
)
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
from sagellm.runtime.port import EngineFacts
from sagellm.runtime.prefixes import Hasher
from sagellm.runtime.user_code import WrongResult, kind_of, place_of_code

_Placing: TypeAlias = tuple[ReplicaPool, Candidates, int]  # the number of the chosen replica


@dataclass(frozen=True, slots=True)
class RouteOptions:
    """`strategy`: a name in the table of `sagellm.operators.routing`, or of a registered strategy.
    `strategy_options`: the options of a strategy that is a class. `pools`: with `engine`, operators
    that share an engine get the same replica; with `operator`, each has a replica of its own, so
    that `prefill` and `decode` may use different replicas of one engine (see `roles`).
    """

    strategy: str = field(default="load_balanced", metadata={"names": "strategies"})
    strategy_options: Mapping[str, Any] = field(default_factory=dict)
    pools: Literal["engine", "operator"] = "engine"


SPEC = OpSpec(
    "route",
    (Port("in", REQUEST),),
    (Port("out", REQUEST),),
    options=RouteOptions,
    subscribes=ROUTER_FEEDBACK | STRATEGY_FEEDBACK,
    signals=frozenset({"forget"}),
    decides="route",
)


@dataclass(frozen=True, slots=True)
class Router:
    """Chooses the replicas of all engines on a request's path at once, because decode blocks are
    reserved before prefill starts.

    Operators of one pool get the same replica number. An engine that is not replicated has only
    replica 0.
    """

    pools: tuple[ReplicaPool, ...]
    strategy: StrategyFunction | Strategy
    hasher: Hasher
    entry: ReplicaPool | None = None  # the pool that requests enter next; None: there are several
    by_node: Mapping[str, ReplicaPool] = field(default_factory=dict)
    facts: Mapping[str, EngineFacts] = field(default_factory=dict)  # by pool
    foresees: bool = False  # the strategy subscribes to "first_token", so a forecast is kept

    @property
    def initial(self) -> RouterView:
        return RouterView.of(self.pools, self.strategy)

    @property
    def subscribes(self) -> frozenset[str]:
        wanted: Iterable[str] = getattr(self.strategy, "subscribes", ())
        return ROUTER_FEEDBACK.union(wanted)

    def on(self, state: RouterView, happened: Input, now: float, draw: Draw) -> Step[RouterView]:
        match happened:
            case Arrival(item=Request() as request):
                # If the only pool that the request can enter has no room, no strategy is asked.
                if self.entry is not None and not state.pools[self.entry.name].free:
                    return Step(state, (Wait(self.entry.entries[0]),))
                if request.avoid:  # replicas that failed with the request before
                    return self._place_elsewhere(state, request)
                return Step(state, (self._placements(state, request, now, draw),))
            case Signal(kind="forget", request_id=request_id):
                return Step(state.forget(request_id))
            case Topology(num_replicas=sizes, removed=removed):
                for pool in self.pools:
                    name, engine = pool.name, pool.engine_name
                    gone = frozenset((name, number) for other, number in removed if other == engine)
                    state = state.resize(name, sizes.get(engine, 1), gone)
                return Step(state)
            case PrefixesChanged(engine=engine, index=index):
                for pool in self.pools:
                    if pool.engine_name == engine:
                        state = state.with_index(pool.name, index)
                return Step(state)
            case CreditChanged() | LoadReported() | HealthChanged():
                changed = self.by_node.get(happened.node)
                if changed is None:
                    return Step(state)
                if self.foresees and isinstance(happened, LoadReported):
                    state = state.measured((changed.name, happened.replica), happened, now)
                return Step(_with_feedback(state, changed, happened))
            case FirstToken(node=node, replica=number) if node in self.by_node:
                return Step(state.measured((self.by_node[node].name, number), happened, now))
        return Step(state)

    def keeps(self, state: RouterView, request_id: str) -> bool:
        return request_id in state.placed

    def followed(self, before: RouterView, own: RouterView, sent: Request) -> RouterView:
        where = tuple((pool.name, sent.placement[pool.nodes[0]]) for pool in self.pools)
        return msgspec.structs.replace(before, states=own.states).place(sent, where)

    def predicted(self, view: RouterView, request: Request, now: float) -> tuple[float | None, int]:
        pool = self.entry
        if pool is None:
            return None, 0
        number, candidates = request.placement[pool.nodes[0]], self._candidates(view, pool, request)
        return candidates.prefill_s(number), candidates.num_cached_tokens(number)

    def _placements(self, view: RouterView, request: Request, now: float, draw: Draw) -> EmitFirst:
        """Ask the strategy, and return the placements to try, best first. A placement is the
        request with its replicas, and the view after the request is sent there.
        """
        best: list[_Placing] = []
        others: list[Iterator[int]] = []
        hold_s = 0.0
        for pool in self.pools:
            chosen = {before.name: number for before, _, number in best}
            candidates = self._candidates(view, pool, request, chosen)
            returned, view = self._ask(view, pool, candidates, now, draw)
            if type(returned) is int and returned >= 0 and candidates.mask >> returned & 1:
                best.append((pool, candidates, returned))  # the common case: one replica, no order
                others.append(candidates.rest(1 << returned))
                continue
            order = self._order(pool, candidates, returned)
            first = next(order)
            if isinstance(first, Hold) and pool.entries:
                hold_s = max(hold_s, first.limit_s)
            number = first.replica if isinstance(first, Hold) else first
            best.append((pool, candidates, number))
            others.append(one for one in order if not isinstance(one, Hold))
        return EmitFirst(_placings(view, request, best, others), hold_s=hold_s)

    def _candidates(
        self,
        view: RouterView,
        pool: ReplicaPool,
        request: Request,
        chosen: Mapping[str, int] = {},
    ) -> Candidates:
        known, name = view.pools[pool.name], pool.name
        facts, turn = self.facts.get(pool.engine_name), view.num_routed
        return Candidates(known, request, turn, self.hasher, facts, view.forecast, name, chosen)

    def _ask(
        self, view: RouterView, pool: ReplicaPool, candidates: Candidates, now: float, draw: Draw
    ) -> tuple[Any, RouterView]:
        """Call the strategy. Returns its order, which is not checked yet, and the view with the
        strategy's new state.
        """
        strategy: Any = self.strategy
        if not hasattr(strategy, "order"):
            return strategy(candidates, now, draw), view
        before = view.states[pool.name]
        answer = strategy.order(before, candidates, now, draw)
        if type(answer) is not tuple or len(answer) != 2:
            raise self._wrong(f"{kind_of(answer)}; an order and a state")
        order, after = answer
        if after is not before:
            view = msgspec.structs.replace(view, states={**view.states, pool.name: after})
        return order, view

    def _place_elsewhere(self, view: RouterView, request: Request) -> Step[RouterView]:
        """Place a request that has failed on some replicas. The least loaded other replica gets the
        request, whatever the strategy.

        If no other replica has room, the request waits. If no other replica is up, the request goes
        back to a replica that failed.
        """
        chosen: list[_Placing] = []
        for pool in self.pools:
            known = view.pools[pool.name]
            avoided = sum(1 << number for name, number in request.avoid if name == pool.engine_name)
            if pool.entries and known.up & ~avoided and not known.free & ~avoided:
                return Step(view, (Wait(pool.entries[0]),))
            usable = known.free & ~avoided or known.up & ~avoided or known.candidates
            candidates = self._candidates(view, pool, request)
            chosen.append((pool, candidates, min(bits(usable), key=candidates.load)))
        return Step(view, (EmitFirst((_placed(view, request, chosen),)),))

    def _order(
        self, pool: ReplicaPool, candidates: Candidates, returned: Any
    ) -> Iterator[int | Hold]:
        """The replicas that the strategy returned, one or several, and then the other candidates by
        load. Only the first item may be a Hold. Raises WrongResult for a wrong replica.
        """
        is_order = isinstance(returned, Iterable) and not isinstance(returned, str)
        tried = 0
        for place, choice in enumerate(returned if is_order else (returned,)):
            number = choice.replica if isinstance(choice, Hold) else choice
            self._check(pool, candidates.pool, number)
            if not place and isinstance(choice, Hold) and candidates.busy >> number & 1:
                yield self._checked(choice)
            elif candidates.mask >> number & ~(tried >> number) & 1:
                tried |= 1 << number
                yield number
        yield from candidates.rest(tried)

    def _check(self, pool: ReplicaPool, known: PoolView, number: object) -> None:
        """Raise WrongResult unless `number` is a replica of the pool that was not removed."""
        if type(number) is not int or not 0 <= number < known.size:
            said = number if type(number) is int else kind_of(number)
            raise self._wrong(f"{said}; a replica of {pool.name}, 0 to {known.size - 1},")
        if known.replicas[number].is_removed:
            said = f"{number}, a replica of {pool.name} that was removed"
            raise self._wrong(f"{said}; one of candidates.numbers")

    def _checked(self, hold: Hold) -> Hold:
        """Return the hold. Raises WrongResult if its limit is negative or not finite."""
        if not 0 <= hold.limit_s < float("inf"):
            raise self._wrong(f"a Hold of {hold.limit_s} seconds; a limit of some seconds")
        return hold

    def _wrong(self, text: str) -> WrongResult:
        strategy: Any = self.strategy
        code = place_of_code(getattr(strategy, "order", strategy))
        return WrongResult(f"the strategy returned {text} was wanted", code)


def _with_feedback(
    view: RouterView, pool: ReplicaPool, happened: CreditChanged | LoadReported | HealthChanged
) -> RouterView:
    """The view after feedback on one replica of `pool`."""
    replica: Replica = pool.name, happened.replica
    match happened:
        case CreditChanged(request_id=request_id, num_left=num_left):
            left = num_left if happened.node in pool.entries else None
            return view.take_back(replica, request_id, left)
        case LoadReported(load=load):
            return view.report(replica, happened.node, happened.sequence, load)
        case HealthChanged(is_up=is_up):
            return view.mark(replica, is_up=is_up)


def _placings(
    view: RouterView, request: Request, best: list[_Placing], others: list[Iterator[int]]
) -> Iterator[tuple[Request, RouterView]]:
    """The request placed at the best replicas, and then at each other replica of the pools that it
    enters next, with the best replicas of all other pools.
    """
    yield _placed(view, request, best)
    for place, ((pool, candidates, _), order) in enumerate(zip(best, others, strict=True)):
        for number in order if pool.entries else ():
            other = (pool, candidates, number)
            yield _placed(view, request, [*best[:place], other, *best[place + 1 :]])


def _placed(
    view: RouterView, request: Request, chosen: list[_Placing]
) -> tuple[Request, RouterView]:
    """The request with a replica for each operator, and the view that counts the request there."""
    placement, where, num_cached = {**request.placement}, [], request.num_cached_tokens
    for pool, candidates, number in chosen:
        where.append((pool.name, number))
        for node in pool.nodes:
            placement[node] = number
        if pool.entries and candidates.pool.index is not None:
            num_cached = candidates.num_cached_tokens(number)
    placed = msgspec.structs.replace(request, placement=placement, num_cached_tokens=num_cached)
    return placed, view.place(placed, tuple(where))


def pools_of(targets: tuple[Target, ...], *, are_apart: bool = False) -> tuple[ReplicaPool, ...]:
    """One pool for each engine of the targets. A target without an engine is a pool of its own.

    `are_apart`: each target is a pool of its own.
    """
    named: dict[str, list[Target]] = {}
    for target in targets:
        name = target.node if are_apart else target.engine or target.node
        named.setdefault(name, []).append(target)
    return tuple(
        ReplicaPool(
            name,
            members[0].num_replicas,
            tuple(target.node for target in members),
            tuple(target.node for target in members if target.is_next),
            members[0].engine,
        )
        for name, members in named.items()
    )


def build(options: RouteOptions, setup: Setup) -> Router:
    """Make the operator. Raises ValueError for an unknown strategy, and GraphError for wrong
    `strategy_options`.
    """
    pools = pools_of(setup.targets, are_apart=options.pools == "operator")
    entries = [pool for pool in pools if pool.entries]
    entry = entries[0] if len(entries) == 1 else None
    by_node = {node: pool for pool in pools for node in pool.nodes}
    found = find_strategy(options.strategy)
    path = ("operators", setup.name, "strategy_options")
    engines = tuple(pool.name for pool in pools)
    strategy = make_strategy(found, options.strategy, options.strategy_options, path, engines)
    foresees = "first_token" in wanted_feedback(strategy, options.strategy, setup.name)
    return Router(pools, strategy, setup.hasher, entry, by_node, setup.facts, foresees)
