"""autoscale: changes the number of replicas of the engines downstream, as their load asks for.

Requests pass unchanged. Every `interval_s` the operator decides, for each of its engines:

    more replicas   as many as serve the predicted requests at `target_load` of their capacity; or
                    one more if the predicted TTFT exceeds `slo_ttft_s` and will do so after a
                    start (ttft), if the steps of all replicas exceed `slo_tpot_s` (tpot), or if
                    requests wait and all pools are full (kv)
    one less        if for `cool_down_s` the others would have served the demand and the open
                    sequences below `removal_load` of their capacity, without long waits

The demand is the higher of the rates now and `start_s` ahead, by `forecast` (`runtime/demand.py`),
times the share of requests that reach the engine. The capacity is `requests_per_s`, or is learned
(`runtime/capacity.py`): the requests that a replica serves with as many open sequences as fit its
batch, its blocks and the objectives. Before eight requests were served there is no prediction.

One change is under way at a time, and the number stays within `min` and `max`. If more replicas are
needed soon after a removal, the next removal takes up to eight times as long. After a failed start
the next try waits `retry_s`, then twice as long, and so on, 32 times at most. In place of a replica
that stays down, one other is added, and no more. The rule is `runtime/scaling.py`.

A request that waits is late for the engine with the largest share of open sequences. So a graph
that splits prefill and decode adds to the role that is the bottleneck.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import msgspec
from msgspec.structs import replace

from sagellm.graphs.sections import AUTOSCALE, SCALED_OPTION, ReplicaBounds
from sagellm.graphs.vocabulary import REQUEST, OpSpec, Port
from sagellm.runtime.capacity import PoolWork
from sagellm.runtime.demand import Demand, ForecastMethod, RateForecast
from sagellm.runtime.feedback import (
    CreditChanged,
    FirstToken,
    HealthChanged,
    LoadReported,
    QueueChanged,
    ScaleEnded,
    Topology,
)
from sagellm.runtime.forecast import Forecast
from sagellm.runtime.messages import EngineReplica, Request
from sagellm.runtime.operator import (
    Arrival,
    Draw,
    Emit,
    Input,
    OperatorOutput,
    ScaleEngine,
    Setup,
    Step,
    Target,
    Wake,
)
from sagellm.runtime.registry import check_and_read_options
from sagellm.runtime.scaling import EngineScaling, ScalingRule, Signs, need_of

_MOST_QUIET = 1000  # intervals without feedback after which the operator sleeps in any case


@dataclass(frozen=True, slots=True)
class AutoscaleOptions:
    """`engines`: the bounds of each engine, as `{max: 4}`; see `ReplicaBounds`. Times in seconds.

    `slo_ttft_s` and `slo_tpot_s`: the objectives; None: no objective. `forecast`: how the rate of
    requests is predicted. `interval_s`: between two decisions. `target_load`: the share of their
    capacity that replicas shall serve. `removal_load`: the share that the others may serve after a
    removal. `cool_down_s`: how long a removal must have been possible. `retry_s`: the pause after a
    failed start.
    """

    engines: Mapping[str, Mapping[str, Any]]
    slo_ttft_s: float | None = field(default=1.0, metadata={"min": 1e-3})
    slo_tpot_s: float | None = field(default=None, metadata={"min": 1e-6})
    forecast: ForecastMethod = "holt"
    interval_s: float = field(default=10.0, metadata={"min": 0.01})
    target_load: float = field(default=0.8, metadata={"min": 0.01, "max": 1.0})
    removal_load: float = field(default=0.7, metadata={"min": 0.01, "max": 1.0})
    cool_down_s: float = field(default=60.0, metadata={"min": 0.0})
    retry_s: float = field(default=30.0, metadata={"min": 0.1})


SPEC = OpSpec(
    AUTOSCALE,
    (Port("in", REQUEST),),
    (Port("out", REQUEST),),
    options=AutoscaleOptions,
    subscribes=frozenset({"credit", "first_token", "health", "load", "queue", "scale", "topology"}),
    signals=frozenset(),
)


class AutoscaleState(msgspec.Struct, frozen=True):
    """The state of the operator. `pools` and `scalings` are by engine.

    `wait_s`: the predicted wait at the last decision. `next_s`: the time of the next decision;
    None: the operator sleeps until something happens. `num_quiet`: decisions since the last input.
    """

    demand: Demand
    pools: Mapping[str, PoolWork]
    scalings: Mapping[str, EngineScaling]
    forecast: Forecast = Forecast()
    wait_s: float = 0.0
    next_s: float | None = None
    num_quiet: int = 0


@dataclass(frozen=True, slots=True)
class Autoscale:
    """Scales the engines of `bounds`. `by_node`: the engine of each of their operators. `last`: the
    operators whose requests count as served. `prefills`: the engines that only prefill.
    """

    initial: AutoscaleState
    bounds: Mapping[str, ReplicaBounds]
    rule: ScalingRule
    by_node: Mapping[str, str]
    last: frozenset[str]
    prefills: frozenset[str]

    def on(
        self, state: AutoscaleState, happened: Input, now: float, draw: Draw
    ) -> Step[AutoscaleState]:
        if isinstance(happened, Wake):
            return self._decide(state, now)
        if state.next_s is None:
            state = self._awake(state, now)
        after = self._after(state, happened, now)
        if after.num_quiet:
            after = replace(after, num_quiet=0)
        outputs = (Emit(happened.item),) if isinstance(happened, Arrival) else ()
        return Step(after, outputs, after.next_s)

    # ---- feedback ----------------------------------------------------------------------------

    def _after(self, state: AutoscaleState, happened: Input, now: float) -> AutoscaleState:
        """The state after an input that is no wake-up."""
        match happened:
            case Arrival(item=Request() as request):
                max_tokens = request.sampling.max_tokens
                demand = state.demand.with_request(request.num_uncached_tokens, max_tokens)
                return replace(state, demand=demand)
            case QueueChanged():
                return replace(state, forecast=state.forecast.after(happened, now))
            case FirstToken():
                state = replace(state, forecast=state.forecast.after(happened, now))
                return self._with_pool(state, happened, now)
            case CreditChanged() | LoadReported() | HealthChanged():
                return self._with_pool(state, happened, now)
            case Topology():
                return replace(state, pools=self._resized(state.pools, happened, now))
            case ScaleEnded(engine=engine, error=error) if engine in self.bounds:
                ended = state.scalings[engine].ended(error, self.rule, now)
                return replace(state, scalings={**state.scalings, engine: ended})
        return state

    def _with_pool(
        self,
        state: AutoscaleState,
        happened: CreditChanged | FirstToken | LoadReported | HealthChanged,
        now: float,
    ) -> AutoscaleState:
        """The state after feedback of an operator that uses an engine."""
        engine = self.by_node.get(happened.node)
        if engine is None:
            return state
        pool, number = state.pools[engine], happened.replica
        match happened:
            case CreditChanged(request_id=""):
                pool = pool.with_credit(happened.node, happened.num_left)
            case CreditChanged():
                pool = pool.with_served() if happened.node in self.last else pool
            case FirstToken():
                pool = pool.with_first_token(number, happened.seconds)
            case LoadReported():
                pool = pool.with_load(number, happened.load, now)
            case HealthChanged():
                pool = pool.with_health(number, now, is_up=happened.is_up)
        return replace(state, pools={**state.pools, engine: pool})

    def _resized(
        self, pools: Mapping[str, PoolWork], topology: Topology, now: float
    ) -> dict[str, PoolWork]:
        """The pools with the replicas that are present."""
        found = {}
        for engine, pool in pools.items():
            numbers = range(topology.num_replicas.get(engine, pool.num_present))
            present = (n for n in numbers if EngineReplica(engine, n) not in topology.removed)
            found[engine] = pool.with_replicas(frozenset(present), now)
        return found

    # ---- decisions ---------------------------------------------------------------------------

    def _awake(self, state: AutoscaleState, now: float) -> AutoscaleState:
        """The state with a decision to come, after a time without load."""
        demand = state.demand.resumed(now, self.rule.interval_s)
        pools = {engine: pool.resumed(now) for engine, pool in state.pools.items()}
        return replace(state, demand=demand, pools=pools, next_s=now + self.rule.interval_s)

    def _decide(self, state: AutoscaleState, now: float) -> Step[AutoscaleState]:
        """Close the interval, and change the engines that need it."""
        demand = state.demand.closed(now)
        pools = {engine: pool.closed(now) for engine, pool in state.pools.items()}
        state = replace(state, demand=demand, pools=pools)
        wait_s, is_late = self._waits(state, now)
        bottleneck = max(self.bounds, key=lambda engine: self._load(pools[engine]))
        scalings: dict[str, EngineScaling] = {}
        outputs: tuple[OperatorOutput, ...] = ()
        for engine, bounds in self.bounds.items():
            pool, scaling = pools[engine], state.scalings[engine]
            per_s = self._demand_of(state, engine, scaling.start_s)
            waiting = state.forecast.pace.backlog.num_requests * self._share(state, engine)
            blamed = is_late and engine == bottleneck
            signs = Signs(per_s, wait_s, blamed, waiting, scaling.start_s)
            need = need_of(pool, signs, bounds, self.rule)
            scalings[engine], change = scaling.decide(pool, need, bounds, self.rule, now)
            if change is not None:
                outputs += (
                    ScaleEngine(engine, change.num_replicas, pool.num_present, change.reason),
                )
        state = replace(state, scalings=scalings, wait_s=wait_s, num_quiet=state.num_quiet + 1)
        next_s = None if self._may_sleep(state) else now + self.rule.interval_s
        return Step(replace(state, next_s=next_s), outputs, next_s)

    def _demand_of(self, state: AutoscaleState, engine: str, start_s: float) -> float:
        """The predicted requests a second that reach an engine, in requests of usual length."""
        per_s = state.demand.peak(start_s / self.rule.interval_s + 1)
        stretch = state.demand.stretch(counts_outputs=engine not in self.prefills)
        return self._share(state, engine) * per_s * stretch

    def _share(self, state: AutoscaleState, engine: str) -> float:
        """The share of requests that reach an engine, as far as is known."""
        most = max(pool.served_per_s for pool in state.pools.values())
        return state.pools[engine].served_per_s / most if most > 0 else 1.0

    def _waits(self, state: AutoscaleState, now: float) -> tuple[float, bool]:
        """The predicted time until the requests that wait have left the queue; and whether first
        tokens come too late for so long that a new replica would help.
        """
        pace, slo_s = state.forecast.pace, self.rule.slo_ttft_s
        if not pace.backlog.num_requests:
            return 0.0, False
        wait_s = pace.wait_s(now)
        if wait_s is None:  # too few were served for a prediction
            per_s = max(pool.served_per_s for pool in state.pools.values())
            wait_s = pace.backlog.num_requests / per_s if per_s > 0 else float("inf")
        if slo_s is None or wait_s + pace.first_token_s <= slo_s:
            return wait_s, False
        start_s = max(scaling.start_s for scaling in state.scalings.values())
        return wait_s, wait_s > start_s or 0 < state.wait_s <= wait_s

    def _load(self, pool: PoolWork) -> float:
        """The open sequences of an engine, as a share of the most that it may have."""
        most_open = pool.most_open(self.rule.slo_ttft_s, self.rule.slo_tpot_s)
        return max(pool.mean_open, pool.num_open) / most_open / max(pool.num_up, 1)

    def _may_sleep(self, state: AutoscaleState) -> bool:
        """Whether nothing can change until something happens."""
        if state.num_quiet <= 1 or state.num_quiet > _MOST_QUIET:
            return state.num_quiet > _MOST_QUIET
        return not state.forecast.pace.backlog.num_requests and all(
            pool.num_present == self.bounds[engine].min and state.scalings[engine].pending_s is None
            for engine, pool in state.pools.items()
        )


def build(options: AutoscaleOptions, setup: Setup) -> Autoscale:
    """Make the operator. Raises ValueError for contradicting options, and GraphError for wrong
    bounds of an engine.
    """
    if options.removal_load >= options.target_load:
        raise ValueError(
            f"{setup.name}: removal_load: {options.removal_load:g} is not below target_load "
            f"{options.target_load:g}: replicas would come and go in turn"
        )
    path = ("operators", setup.name, SCALED_OPTION)
    bounds = {
        engine: check_and_read_options(ReplicaBounds, given, (*path, engine))
        for engine, given in options.engines.items()
    }
    used = [target for target in setup.targets if target.engine in bounds]
    by_engine: dict[str, list[Target]] = {engine: [] for engine in bounds}
    for target in used:
        by_engine[target.engine].append(target)
    pools = {
        engine: PoolWork.opened(
            max((one.num_replicas for one in targets), default=1), setup.facts.get(engine)
        )
        for engine, targets in by_engine.items()
    }
    scalings = {engine: EngineScaling(one.start_s) for engine, one in bounds.items()}
    demand = Demand(RateForecast(options.forecast))
    return Autoscale(
        AutoscaleState(demand, pools, scalings),
        bounds,
        _rule(options),
        {target.node: target.engine for target in used},
        frozenset(node for targets in by_engine.values() for node in _last_nodes(targets)),
        frozenset(
            engine
            for engine, targets in by_engine.items()
            if all(one.prefills_only for one in targets)
        ),
    )


def _last_nodes(targets: list[Target]) -> list[str]:
    """The operators of an engine that end its work on a request: if it decodes, not `prefill`."""
    last = [one for one in targets if not one.prefills_only] or targets
    return [one.node for one in last]


def _rule(options: AutoscaleOptions) -> ScalingRule:
    return ScalingRule(
        options.slo_ttft_s,
        options.slo_tpot_s,
        options.target_load,
        options.removal_load,
        options.interval_s,
        options.cool_down_s,
        options.retry_s,
    )
