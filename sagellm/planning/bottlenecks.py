"""What bounds a graph: each resource with what a simulation says of it, and with what twice as much
of it would gain.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any, TypeAlias

from msgspec import structs

from sagellm.graphs.ir import Graph
from sagellm.graphs.rules.deployment import unrouted_nodes
from sagellm.graphs.text.yaml import Document
from sagellm.planning.service_level import ServiceLevel
from sagellm.planning.step_use import EngineSteps, StepUse
from sagellm.runtime.engine.costs.fitted import FittedForm
from sagellm.runtime.engine.costs.profile import Profile, profile_file, read_profile, write_profile
from sagellm.runtime.engine.costs.roofline import RooflineForm
from sagellm.runtime.engine.costs.table import TableForm
from sagellm.simulation.figures import SimulationSummary, summarise
from sagellm.simulation.simulation_run import SimulatedRun, modelled_graph, simulate
from sagellm.simulation.sweep import MeasurePoints, SweepPoint

_LEAST_GAIN = 0.01  # of goodput or of latency: less is no bound


@dataclass(frozen=True, slots=True)
class Change:
    """More of one resource. `evidence`: what the simulation without it says of the resource."""

    resource: str
    change: str
    evidence: str
    overrides: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class ResourceGain:
    """The effect of a change: `gain` of goodput, and `relief` of the worst latency over its bound,
    both as shares of what was.
    """

    change: Change
    summary: SimulationSummary
    gain: float
    relief: float

    @property
    def bounds(self) -> bool:
        return max(self.gain, self.relief) >= _LEAST_GAIN


@dataclass(frozen=True, slots=True)
class Explanation:
    """A graph as it is, and the effects of changes: the largest gain first. `missed`: the share of
    all requests that missed the bound of "ttft" and of "tpot", or were not served.
    """

    summary: SimulationSummary
    missed: Mapping[str, float]
    effects: Sequence[ResourceGain]

    @property
    def bound(self) -> ResourceGain | None:
        """The resource that bounds the graph; None: no single one does."""
        first = self.effects[0] if self.effects else None
        return first if first is not None and first.bounds else None


def explain(
    point: SweepPoint, level: ServiceLevel, measure: MeasurePoints, folder: Path
) -> Explanation:
    """Simulate a graph, and again with each of its resources doubled. Changed profiles are written
    to `folder`. Raises GraphError, SimulationError, EngineOptionError.
    """
    graph = modelled_graph(point.point)
    use = StepUse(graph)
    as_is = replace(point.point, document=Document(graph, {}), overrides={}, profile="")
    run = simulate(replace(as_is, on_run=use))
    summary = summarise(run, point.objective, point.prices)
    changes = list(_changes(graph, use, run, summary, folder))
    points = [replace(point, point=replace(as_is, overrides=one.overrides)) for one in changes]
    found = [
        _effect(one, summary, after, level)
        for one, after in zip(changes, measure(points), strict=True)
    ]
    found.sort(key=lambda one: (-round(one.gain, 6), -one.relief, one.change.resource))
    return Explanation(summary, _missed(run, level), found)


def _missed(run: SimulatedRun, level: ServiceLevel) -> dict[str, float]:
    total = max(1, len(run.requests))
    unserved = sum(not one.is_ok for one in run.requests)
    late = slow = unserved
    for one in run.requests:
        ttft_s, tpot_s = one.slo_ttft_s or level.ttft_s, level.tpot_s
        late += one.is_ok and ttft_s is not None and (one.ttft_s or 0.0) > ttft_s
        slow += one.is_ok and tpot_s is not None and (one.tpot_s or 0.0) > tpot_s
    return {"ttft": late / total, "tpot": slow / total}


def _effect(
    change: Change, before: SimulationSummary, after: SimulationSummary, level: ServiceLevel
) -> ResourceGain:
    # Of equal requests: a run that ends later has a lower rate for the same attainment.
    goods = before.slo_attainment or 0.0, after.slo_attainment or 0.0
    gain = (goods[1] - goods[0]) / goods[0] if goods[0] else float(goods[1] > 0)
    uses = level.use(before), level.use(after)
    return ResourceGain(change, after, gain, 1 - uses[1] / uses[0] if uses[0] else 0.0)


def _changes(
    graph: Graph, use: StepUse, run: SimulatedRun, summary: SimulationSummary, folder: Path
) -> Iterator[Change]:
    names = unrouted_nodes(graph)  # which have one replica
    unrouted = [node for node in graph.nodes if node.name in names]
    for name, steps in use.engines.items():
        yield from _of_costs(name, steps, folder)
        yield from _of_limits(name, steps, run, summary)
        if not any(one.attrs.get("engine") == name for one in unrouted):
            yield _of_replicas(name, steps, run, summary)
    yield from _of_transfers(graph, use, run)
    refused = summary.refusals.get("queue_full", 0)
    for node in graph.nodes:
        if node.op == "admission" and refused:
            limit = node.attrs.get("max_queued", 4096)
            assert isinstance(limit, int)
            evidence = f"{refused} requests refused"
            overrides = {f"{node.name}.max_queued": 2 * limit}
            yield Change(f"queue of {node.name}", "2 x max_queued", evidence, overrides)


# ---- the cost of steps -----------------------------------------------------------------------


def _of_costs(name: str, steps: EngineSteps, folder: Path) -> Iterator[Change]:
    """Devices whose arithmetic, memory, exchange or fixed times are twice as fast."""
    if steps.options.profile is None:
        yield from _of_cost_options(name, steps)
        return
    profile = read_profile(steps.options.profile)
    for number, (resource, change, evidence, cost) in enumerate(_faster(profile, steps)):
        file = folder / f"{name}-{number}.json"
        if isinstance(cost, TableForm):
            table = profile_file(steps.options.profile).parent / cost.file
            cost = structs.replace(cost, file=str(table.resolve()))
        write_profile(file, structs.replace(profile, cost=cost))
        yield Change(f"{resource} of {name}", change, evidence, {f"{name}.profile": str(file)})


_Faster: TypeAlias = tuple[str, str, str, FittedForm | RooflineForm | TableForm]


def _faster(profile: Profile, steps: EngineSteps) -> Iterator[_Faster]:
    cost = profile.cost
    if isinstance(cost, FittedForm):
        yield from _faster_fitted(cost)
    elif isinstance(cost, TableForm):
        if cost.step_s:
            yield "fixed time", "1/2 x", "", structs.replace(cost, step_s=cost.step_s / 2)
    else:
        yield from _faster_device(cost, steps)


def _faster_device(cost: RooflineForm, steps: EngineSteps) -> Iterator[_Faster]:
    def said(*names: str) -> str:
        return f"{steps.share(*names) or 0.0:.0%} of busy time"

    compute = structs.replace(cost, peak_flops=2 * cost.peak_flops)
    yield "compute", "2 x FLOP/s", said("compute_s"), compute
    memory = structs.replace(cost, bytes_per_s=2 * cost.bytes_per_s)
    read = f"{steps.share('weights_s') or 0.0:.0%} weights, {steps.share('kv_s') or 0.0:.0%} KV"
    yield "memory bandwidth", "2 x bytes/s", f"{read}, of busy time", memory
    fixed = structs.replace(cost, step_s=cost.step_s / 2, layer_s=cost.layer_s / 2)
    yield "fixed time", "1/2 x", said("fixed_s"), fixed
    if steps.cost is not None and steps.cost.group.num_devices > 1:
        speed = {"link_bytes_per_s": 2 * cost.link_bytes_per_s}
        links = structs.replace(cost, all_reduce_s=cost.all_reduce_s / 2, **speed)
        share = said("exchange_s", "bubble_s")
        yield "exchange between devices", "2 x bytes/s, 1/2 x latency", share, links


def _faster_fitted(cost: FittedForm) -> Iterator[_Faster]:
    tokens = tuple(one / 2 for one in cost.token_seconds)
    compute = structs.replace(cost, token_seconds=tokens, prefill_pair_s=cost.prefill_pair_s / 2)
    yield "time of tokens", "1/2 x", "", compute
    contexts = tuple(one / 2 for one in cost.context_seconds)
    memory = structs.replace(cost, context_seconds=contexts)
    yield "time of contexts", "1/2 x", "", memory
    fixed = {
        name: getattr(cost, name) / 2
        for name in ("step_s", "row_s", "prefill_step_s", "mixed_step_s")
    }
    yield "fixed time", "1/2 x", "", structs.replace(cost, **fixed)


def _of_cost_options(name: str, steps: EngineSteps) -> Iterator[Change]:
    """An engine whose cost is given by its options."""
    options = steps.options
    for resource, each in (
        ("compute of prompts", ("prefill_token_s", "prefill_pair_s")),
        ("fixed time", ("decode_step_s",)),
        ("time of contexts", ("context_token_s",)),
        ("time of sequences", ("decode_row_s",)),
    ):
        values = {f"{name}.{one}": getattr(options, one) / 2 for one in each}
        if any(values.values()):
            yield Change(f"{resource} of {name}", "1/2 x", "", values)


# ---- limits and replicas ---------------------------------------------------------------------


def _of_limits(
    name: str, steps: EngineSteps, run: SimulatedRun, summary: SimulationSummary
) -> Iterator[Change]:
    options, uses = steps.options, [one for one in summary.engines if one.engine == name]
    num_preempted = sum(one.num_preemptions for one in uses)
    peak = f"peak {max(one.kv_peak for one in uses):.0%}, {num_preempted} preemptions"
    num_blocks = run.engines[name][0].facts.num_blocks
    pool = {f"{name}.num_blocks": 2 * num_blocks}
    if options.kv_memory is not None:
        pool[f"{name}.kv_memory"] = None  # type: ignore[assignment]
    yield Change(f"KV capacity of {name}", "2 x blocks", peak, pool)
    full = f"{_over(steps.full_s, steps.busy_s):.0%} of busy time at {options.max_num_seqs}"
    seqs = {f"{name}.max_num_seqs": 2 * options.max_num_seqs}
    yield Change(f"max_num_seqs of {name}", "2 x", full, seqs)
    tokens = options.max_num_batched_tokens
    mixed = _interference(steps)
    more = {f"{name}.max_num_batched_tokens": 2 * tokens}
    yield Change(f"tokens of a step of {name}", f"2 x {tokens}", mixed, more)
    if steps.num_mixed and tokens >= 4:
        less = {f"{name}.max_num_batched_tokens": tokens // 2}
        yield Change(f"prefill interference in {name}", f"1/2 x {tokens} tokens", mixed, less)


def _interference(steps: EngineSteps) -> str:
    """How much longer a step takes that computes prompts beside answers."""
    share = _over(steps.mixed_s, steps.busy_s)
    if not steps.num_mixed or not steps.num_decodes:
        return f"{share:.0%} of busy time in steps with prompts and answers"
    times = (steps.mixed_s / steps.num_mixed, steps.decode_s / steps.num_decodes)
    with_ms, without_ms = (one * 1e3 for one in times)
    return (
        f"{share:.0%} of busy time: {with_ms:.1f} ms a step with prompts, {without_ms:.1f} without"
    )


def _of_replicas(
    name: str, steps: EngineSteps, run: SimulatedRun, summary: SimulationSummary
) -> Change:
    busy = fmean(one.busy for one in summary.engines if one.engine == name)
    queue_ms, prefill_ms = (summary.phases_ms.get(one, 0.0) for one in ("queue", "prefill"))
    queued = _over(queue_ms, queue_ms + prefill_ms)
    evidence = f"busy {busy:.0%}; {queued:.0%} of TTFT in the queue"
    number = len(run.engines[name])
    return Change(
        f"replicas of {name}", f"2 x {number}", evidence, {f"{name}.replicas": 2 * number}
    )


def _of_transfers(graph: Graph, use: StepUse, run: SimulatedRun) -> Iterator[Change]:
    """The links between pools, and the transfers that may be under way at a time."""
    moves = [node for node in graph.nodes if node.op == "kv_transfer"]
    if not moves:
        return
    served = [one for one in run.requests if one.is_ok]
    total_s = sum(one.e2e_s for one in served)
    moved_s = sum(one.phases.transfer_s for one in served)
    evidence = f"{_over(moved_s, total_s):.1%} of end-to-end time in transfers"
    speeds = {
        f"{name}.kv_bytes_per_s": 2 * steps.options.kv_bytes_per_s
        for name, steps in use.engines.items()
    }
    yield Change("transfer link", "2 x bytes/s", evidence, speeds)
    limits = {f"{node.name}.max_inflight": 2 * _inflight(node.attrs) for node in moves}
    yield Change("max_inflight of transfers", "2 x", evidence, limits)


def _inflight(attrs: Mapping[str, Any]) -> int:
    return int(attrs.get("max_inflight", 4))


def _over(count: float, of: float) -> float:
    return count / of if of > 0 else 0.0
