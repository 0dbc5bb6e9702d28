"""The search for the cheapest placement that meets a service level: pruning, then simulations of
ever longer parts of the trace (successive halving: Jamieson and Talwalkar, 2016).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from random import Random
from statistics import fmean, stdev

from msgspec import structs

from sagellm.load.traces import PlannedRequest
from sagellm.planning.layouts import (
    Placement,
    Pool,
    SearchAxes,
    advised,
    groups,
    layouts,
)
from sagellm.planning.plan_task import PlanTask
from sagellm.planning.pruning import Pruner
from sagellm.runtime.engine.costs.parallel import Parallelism
from sagellm.simulation.figures import SimulationSummary
from sagellm.simulation.sweep import MeasurePoints

_FIRST_RUNG, _RUNG_FACTOR = (
    256,
    4,
)  # requests of the shortest part, and how much longer each next is
_SLACK = 0.1  # of attainment on a part of the trace, which the whole may have more of
_LEAST_KEPT = 4  # placements that go on, of those that may still meet the level
_EQUAL_COST = 1.02  # costs within 2 % count as equal: the last request's end decides on less
_NUM_WINDOWS = 10  # of the trace, which a resampled trace has in another order, some repeatedly


@dataclass(frozen=True, slots=True)
class Candidate:
    """A placement with its figures on the whole trace."""

    placement: Placement
    summary: SimulationSummary
    is_met: bool

    @property
    def attained(self) -> float:
        return self.summary.slo_attainment or 0.0


@dataclass(frozen=True, slots=True)
class Advice:
    """A placement of the published advice; without figures, `reason` says why it cannot be."""

    layout: str
    found: Candidate | None
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Certainty:
    """The attainments of a placement on resampled traces, each with a seed of its own."""

    attained: tuple[float, ...]
    num_met: int

    @property
    def mean(self) -> float:
        return fmean(self.attained)

    @property
    def deviation(self) -> float:
        return stdev(self.attained) if len(self.attained) > 1 else 0.0


@dataclass(slots=True)
class PlanResult:
    """The outcome of a search. `winner`: None if nothing meets the level; then `nearest` is the
    placement with the highest attainment, if any was simulated. `misfits`: why groups of devices
    cannot serve the model. `pruned`: placements that no schedule makes meet the level, by the
    bound. `num_dearer`: placements that cannot be cheaper than the winner.
    """

    winner: Candidate | None = None
    nearest: Candidate | None = None
    runners_up: list[Candidate] = field(default_factory=list)
    advice: list[Advice] = field(default_factory=list)
    misfits: dict[str, str] = field(default_factory=dict)
    pruned: dict[str, int] = field(default_factory=dict)
    num_placements: int = 0
    num_dearer: int = 0
    num_simulations: int = 0
    certainty: Certainty | None = None


class Search:
    """Finds the cheapest placement of a task. Equal arguments give equal results.

    `num_gpus`: the devices there are. `measure`: simulates points, in order. Placements of few
    devices are tried first: one of more devices cannot cost less than all its devices from the
    first arrival to the last, so the search ends where that is dearer than the best.
    """

    def __init__(
        self, task: PlanTask, num_gpus: int, axes: SearchAxes, measure: MeasurePoints
    ) -> None:
        self._task = task
        self._num_gpus = num_gpus
        self._axes = axes
        self._measure = measure
        self._pruner = Pruner(task)
        self._found: list[Candidate] = []
        self.result = PlanResult()

    def run(self, num_seeds: int) -> PlanResult:
        """Search, simulate the advice, and resample the trace `num_seeds` times for the winner."""
        result, best = self.result, None
        usable = self._usable()
        for num_gpus in range(1, self._num_gpus + 1):
            level = list(self._placements(num_gpus, usable))
            result.num_placements += len(level)
            if best is not None and self._least_cost(num_gpus) > best * _EQUAL_COST:
                result.num_dearer += len(level)
                continue
            self._found += self._halve(self._prune(level))
            best = min((one.summary.cost for one in self._found if one.is_met), default=None)
        self._rank()
        result.advice = [self._advice(group) for group in advised(self._num_parameters)]
        chosen = result.winner
        if chosen is not None and num_seeds:
            result.certainty = self._resample(chosen.placement, num_seeds)
        return result

    @property
    def _num_parameters(self) -> int:
        return self._task.facts.num_parameters

    def _usable(self) -> tuple[Parallelism, ...]:
        """The groups that the model fits."""
        found = []
        for group in groups(self._num_gpus, self._task.facts):
            misfit = self._task.fit(group).misfit
            if misfit:
                self.result.misfits[group.name] = misfit
            else:
                found.append(group)
        if self._task.facts.experts is None:
            self.result.misfits["EP"] = "needs a mixture of experts, and the model is dense"
        return tuple(found)

    def _placements(self, num_gpus: int, usable: tuple[Parallelism, ...]) -> Iterator[Placement]:
        axes = self._axes
        for pools in layouts(num_gpus, usable):
            limits = product(axes.max_num_seqs, axes.max_num_batched_tokens, axes.policies)
            yield from (Placement(pools, *values) for values in limits)

    def _prune(self, level: Sequence[Placement]) -> list[Placement]:
        """Leave out what cannot meet the level, whatever a schedule does."""
        kept = []
        for placement in level:
            ceiling = self._pruner.ceiling(placement)
            if ceiling.share < self._task.level.attainment:
                number = self.result.pruned.get(ceiling.bound, 0)
                self.result.pruned[ceiling.bound] = number + 1
            else:
                kept.append(placement)
        return kept

    def _halve(self, level: list[Placement]) -> list[Candidate]:
        """Simulate the placements on ever longer parts of the trace, and keep the better half each
        time. The first part has the first policy alone: on it, queues are short.
        """
        lengths = list(_rungs(len(self._task.workload)))
        policies = self._axes.policies
        if len(lengths) > 1:
            level = [one for one in level if one.policy == policies[0]]
        for number, length in enumerate(lengths):
            if not level:
                return []
            if number == 1:
                level = [replace(one, policy=name) for one in level for name in policies]
            found = self._simulate(level, length)
            if number == len(lengths) - 1:
                return found
            level = self._better_half(found)
        return []

    def _better_half(self, found: list[Candidate]) -> list[Placement]:
        level = self._task.level
        ranked = sorted(found, key=self._merit)
        near = [one for one in ranked if one.attained >= level.attainment - _SLACK]
        kept = near[: max(_LEAST_KEPT, len(near) // 2)] or ranked[:1]
        return [one.placement for one in kept]

    def _merit(self, one: Candidate) -> tuple[float, float, str]:
        """Sorts the best placement first: in time more often, then with more room, then by name."""
        return -one.attained, self._task.level.use(one.summary), one.placement.name

    def _simulate(self, level: Sequence[Placement], length: int) -> list[Candidate]:
        """The figures of placements on the middle `length` requests of the trace."""
        whole = self._task.workload
        first = (len(whole) - length) // 2
        is_whole = length == len(whole)  # exactly as `sagellm simulate` plays it
        part = whole if is_whole else _from_zero(whole[first : first + length])
        self.result.num_simulations += len(level)
        summaries = self._measure([self._task.point(one, part) for one in level])
        is_met = self._task.level.is_met
        return [
            Candidate(one, summary, is_met(summary))
            for one, summary in zip(level, summaries, strict=True)
        ]

    def _least_cost(self, num_gpus: int) -> float:
        """The cost of so many devices from the first arrival to the last."""
        workload = self._task.workload
        span_s = workload[-1].at_s - workload[0].at_s
        price = self._task.price
        return num_gpus * span_s * (1.0 if price is None else price / 3600)

    def _rank(self) -> None:
        """Choose the winner: of those that cost as little as the cheapest, the one most in time."""
        met = [one for one in self._found if one.is_met]
        if not met:
            self.result.nearest = min(self._found, key=self._merit, default=None)
            return
        least = min(one.summary.cost for one in met)
        cheap = [one for one in met if one.summary.cost <= least * _EQUAL_COST]
        winner = min(cheap, key=self._merit)
        self.result.winner = winner
        others = [one for one in self._found if one is not winner]
        others.sort(key=lambda one: (not one.is_met, one.summary.cost, *self._merit(one)))
        self.result.runners_up = others

    def _advice(self, group: Parallelism) -> Advice:
        """The advice on as many replicas as there is room for, with the limits that are usual."""
        num_replicas = self._num_gpus // group.num_devices
        fit = self._task.fit(group)
        if not num_replicas:
            return Advice(group.name, None, f"needs {group.num_devices} devices")
        placement = Placement((Pool(group, num_replicas),))
        if fit.misfit:
            return Advice(placement.layout, None, fit.misfit)
        (found,) = self._simulate([placement], len(self._task.workload))
        return Advice(placement.layout, found)

    def _resample(self, placement: Placement, num_seeds: int) -> Certainty:
        """The attainments on traces that have windows of this one, drawn with replacement."""
        workload = self._task.workload
        points = [
            self._task.point(placement, resampled(workload, seed), seed)
            for seed in range(1, num_seeds + 1)
        ]
        self.result.num_simulations += num_seeds
        summaries = self._measure(points)
        attained = tuple(one.slo_attainment or 0.0 for one in summaries)
        return Certainty(attained, sum(map(self._task.level.is_met, summaries)))


def resampled(workload: Sequence[PlannedRequest], seed: int) -> list[PlannedRequest]:
    """Windows of a trace in random order, with replacement: as long as the trace, and with as much
    correlation between neighbours (block bootstrap: Künsch, 1989). A window that comes again shares
    no prefixes with itself.
    """
    draw = Random(f"{seed}/windows")
    start_s, span_s = workload[0].at_s, workload[-1].at_s - workload[0].at_s
    width_s = span_s / _NUM_WINDOWS or 1.0
    windows: list[list[PlannedRequest]] = [[] for _ in range(_NUM_WINDOWS)]
    for one in workload:
        number = min(_NUM_WINDOWS - 1, int((one.at_s - start_s) / width_s))
        windows[number].append(one)
    num_blocks = 1 + max((block for one in workload for block in one.block_ids), default=0)
    found, times_taken = [], [0] * _NUM_WINDOWS
    for place in range(_NUM_WINDOWS):
        number = draw.randrange(_NUM_WINDOWS)
        shift_s = (place - number) * width_s - start_s
        offset = times_taken[number] * num_blocks
        times_taken[number] += 1
        for one in windows[number]:
            block_ids = tuple(block + offset for block in one.block_ids)
            found.append(structs.replace(one, at_s=one.at_s + shift_s, block_ids=block_ids))
    return _from_zero(found) or list(workload)


def _from_zero(workload: Sequence[PlannedRequest]) -> list[PlannedRequest]:
    """The requests with times from the first of them."""
    if not workload:
        return []
    start_s = workload[0].at_s
    return [structs.replace(one, at_s=one.at_s - start_s) for one in workload]


def _rungs(num_requests: int) -> Iterator[int]:
    """The lengths of the parts of the trace; the last is the whole."""
    length = _FIRST_RUNG
    while length * 2 <= num_requests:
        yield length
        length *= _RUNG_FACTOR
    yield num_requests
