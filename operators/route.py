"""route: chooses a replica for every engine operator downstream, the (prefill, decode) pair."""

from dataclasses import dataclass, field

import msgspec

from sagellm.graphs.vocabulary import REQUEST, OpSpec, Port
from sagellm.operators.routing import Strategy, find_strategy
from sagellm.operators.routing.view import Pool, Report, View
from sagellm.runtime.engine.port import EngineLoad
from sagellm.runtime.messages import Request
from sagellm.runtime.operator import (
    Arrival,
    Draw,
    Emit,
    Feedback,
    Input,
    Setup,
    Signal,
    Step,
    Target,
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
    hears=frozenset({"credit", "load", "health", "removed"}),
)


@dataclass(frozen=True, slots=True)
class Route:
    """Chooses for the whole path at once: decode's blocks are reserved before prefill starts.

    Operators that share an engine get the same replica of it. Where no target is replicated the
    request passes with each placed on replica 0.
    """

    pools: tuple[Pool, ...]
    strategy: Strategy

    @property
    def initial(self) -> View:
        return View()

    def on(self, state: View, happened: Input, now: float, draw: Draw) -> Step[View]:
        match happened:
            case Arrival(item=Request() as request):
                return self._place(state, request, draw)
            case Signal(kind="forget", request_id=request_id):
                return Step(state.forget(request_id))
            case Feedback(node, number, _, "credit"):
                pool = self._pool_of(node)
                return Step(state.take_back((pool.name, number)) if pool else state)
            case Feedback(node, number, sequence, "load", EngineLoad() as load):
                pool = self._pool_of(node)
                report = Report(node, sequence, load)
                return Step(state.report((pool.name, number), report) if pool else state)
            case Feedback(node, number, _, "health", bool() as is_up):
                pool = self._pool_of(node)
                return Step(state.mark((pool.name, number), is_up=is_up) if pool else state)
            case Feedback(node, number, _, "removed"):
                pool = self._pool_of(node)
                return Step(state.remove((pool.name, number)) if pool else state)
        return Step(state)

    def _place(self, view: View, request: Request, draw: Draw) -> Step[View]:
        chosen = tuple((pool, self._choose(request, pool, view, draw)) for pool in self.pools)
        placement = {node: number for pool, number in chosen for node in pool.nodes}
        placed = msgspec.structs.replace(request, placement={**request.placement, **placement})
        after = view.place(request, tuple((pool.name, number) for pool, number in chosen))
        return Step(after, (Emit(placed),))

    def _choose(self, request: Request, pool: Pool, view: View, draw: Draw) -> int:
        """Raises WrongResult where the strategy gives no replica of the pool, or one that is not to
        come back.
        """
        replica = self.strategy(request, pool, view, draw)
        num_replicas = pool.size(view)
        if type(replica) is not int or not 0 <= replica < num_replicas:
            said = replica if type(replica) is int else kind_of(replica)
            raise self._wrong(f"{said}; a replica of {pool.name}, 0 to {num_replicas - 1},")
        if (pool.name, replica) in view.removed:
            said = f"{replica}, a replica of {pool.name} that was removed"
            raise self._wrong(f"{said}; one of pool.live(view)")
        return replica

    def _wrong(self, text: str) -> WrongResult:
        code = place_of_code(self.strategy)
        return WrongResult(f"the strategy returned {text} was wanted", code)

    def _pool_of(self, node: str) -> Pool | None:
        return next((pool for pool in self.pools if node in pool.nodes), None)


def pools_of(targets: tuple[Target, ...]) -> tuple[Pool, ...]:
    """The targets by engine; one without an engine is a pool of its own."""
    named: dict[str, list[Target]] = {}
    for target in targets:
        named.setdefault(target.engine or target.node, []).append(target)
    return tuple(
        Pool(name, members[0].num_replicas, tuple(target.node for target in members))
        for name, members in named.items()
    )


def build(options: Options, setup: Setup) -> Route:
    return Route(pools_of(setup.targets), find_strategy(options.strategy))
