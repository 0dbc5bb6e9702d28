"""The most that a placement can attain, without simulating it: bounds that no schedule beats."""

from bisect import bisect_right
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from itertools import accumulate

from sagellm.load.traces import BLOCK_LEN, PlannedRequest
from sagellm.planning.layouts import Placement, Pool
from sagellm.planning.plan_task import PlanTask
from sagellm.runtime.engine.costs.parallel import Parallelism
from sagellm.runtime.engine.costs.roofline import RooflineCost
from sagellm.runtime.engine.step_cost import CostModel, StepShape, step_shape

_MANY = 1_000_000  # tokens of a step in which arithmetic takes longer than reading weights


@dataclass(frozen=True, slots=True)
class LeastWork:
    """The least needs of one request. `uncached`: prompt tokens that no earlier request has, in a
    cache without bounds. `context`: the mean context of its decodes.
    """

    uncached: int
    output_len: int
    context: int
    slo_ttft_s: float | None


def least_work(workload: Sequence[PlannedRequest]) -> list[LeastWork]:
    """The least work of each request, in the order of arrival."""
    known: set[int] = set()
    found = []
    for one in workload:
        num_cached = next(
            (n for n, block in enumerate(one.block_ids) if block not in known), len(one.block_ids)
        )
        known.update(one.block_ids)
        uncached = max(1, one.input_len - num_cached * BLOCK_LEN)
        context = one.input_len + (one.output_len - 1) // 2
        found.append(LeastWork(uncached, one.output_len, context, one.slo_ttft_s))
    return found


@dataclass(frozen=True, slots=True)
class Ceiling:
    """The highest share of requests that can be in time, and what bounds it."""

    share: float
    bound: str


class Pruner:
    """The ceilings of placements. Costs must not fall with more work: of a measured profile, which
    may not hold that, every ceiling is 1.
    """

    def __init__(self, task: PlanTask) -> None:
        self._task = task
        self._work = least_work(task.workload)
        self._span_s = task.workload[-1].at_s - task.workload[0].at_s
        # Many placements have the same groups, and traces are long: each is looked at once.
        self._alone = cache(self._find_alone)
        self._costs = cache(self._find_cost)
        self._prompt_sums = cache(self._find_prompt_sums)
        self._answer_sums = cache(self._find_answer_sums)

    def ceiling(self, placement: Placement) -> Ceiling:
        """The lowest of the bounds of a placement: each request alone, and all together."""
        if not self._task.is_roofline:
            return Ceiling(1.0, "")
        first, last = placement.pools[0], placement.pools[-1]
        return min(
            self._alone(first.group, last.group, placement.max_num_batched_tokens),
            self._prompts(first),
            self._answers(last, is_split=placement.is_split),
            key=lambda one: one.share,
        )

    def _find_cost(self, group: Parallelism) -> RooflineCost:
        cost = self._task.cost(Pool(group, 1), 2, 2)
        assert isinstance(cost, RooflineCost)
        return cost

    def _find_alone(self, first: Parallelism, last: Parallelism, budget: int) -> Ceiling:
        """Of requests that have engines to themselves, with steps of at most `budget` tokens."""
        level, prefill, decode = self._task.level, self._costs(first), self._costs(last)
        longest = max(one.uncached for one in self._work)
        bounds = {one.slo_ttft_s or level.ttft_s for one in self._work}
        lengths = {
            bound: longest
            if bound is None
            else _most(
                longest,
                bound,
                lambda length: prompt_seconds(prefill, length, budget, first.pipeline),
            )
            for bound in bounds
        }
        highest = max(one.context for one in self._work)
        context = highest
        if level.tpot_s is not None:
            # Among as many sequences as stages, the stages share the context of one.
            rows = last.pipeline
            context = _most(
                highest, level.tpot_s, lambda length: decode.seconds(StepShape(0, 0, rows, length))
            )
        num_prompts = num_both = 0
        for one in self._work:
            if one.uncached <= lengths[one.slo_ttft_s or level.ttft_s]:
                num_prompts += 1
                num_both += one.output_len < 2 or one.context <= context
        total = len(self._work)
        name = "TTFT" if num_prompts / total < level.attainment else "TPOT"
        return Ceiling(num_both / total, f"{name} of requests alone")

    def _prompts(self, pool: Pool) -> Ceiling:
        """Prompts in time are computed until the last objective is over."""
        ttft_s = self._ttft_s
        if ttft_s is None:
            return Ceiling(1.0, "")
        sums = self._prompt_sums(pool.group)
        available_s = pool.replicas * (self._span_s + ttft_s)
        return Ceiling(_share(sums, available_s), "compute of prompts")

    def _answers(self, pool: Pool, *, is_split: bool) -> Ceiling:
        """The same of answers, and of prompts where they share devices."""
        ttft_s, tpot_s = self._ttft_s, self._task.level.tpot_s
        if ttft_s is None or tpot_s is None:
            return Ceiling(1.0, "")
        longest = max(one.output_len for one in self._work)
        sums = self._answer_sums(pool.group, is_split)
        available_s = pool.replicas * (self._span_s + ttft_s + tpot_s * longest)
        return Ceiling(_share(sums, available_s), "memory bandwidth and compute of answers")

    def _find_prompt_sums(self, group: Parallelism) -> list[float]:
        """The seconds of the shortest prompt, of the two shortest, and so on."""
        token_s, pair_s, _ = _rates(self._costs(group))
        return _sums(one.uncached * token_s + one.uncached**2 / 2 * pair_s for one in self._work)

    def _find_answer_sums(self, group: Parallelism, is_split: bool) -> list[float]:
        token_s, pair_s, context_s = _rates(self._costs(group))
        seconds = []
        for one in self._work:
            each_s = (one.output_len - 1) * (token_s + one.context * context_s)
            if not is_split:
                each_s += one.uncached * token_s + one.uncached**2 / 2 * pair_s
            seconds.append(each_s)
        return _sums(seconds)

    @cached_property
    def _ttft_s(self) -> float | None:
        """The latest objective of any request; None: some request has none."""
        bounds = [one.slo_ttft_s or self._task.level.ttft_s for one in self._work]
        return None if None in bounds else max(bound for bound in bounds if bound is not None)


def prompt_seconds(cost: CostModel, length: int, budget: int, num_stages: int = 1) -> float:
    """The time of the prompt of a request that is alone, in steps of at most `budget` tokens. Steps
    with fewer tokens than stages do not count: beside others they may take less.
    """
    starts = range(0, length, budget)
    chunks = [(start, min(budget, length - start), length) for start in starts]
    return sum(cost.seconds(step_shape([one])) for one in chunks if one[1] >= num_stages)


def _most(highest: int, bound_s: float, seconds: Callable[[int], float]) -> int:
    """The most tokens that take at most `bound_s`; 0: none do."""
    return bisect_right(range(1, highest + 1), bound_s, key=seconds)


def _rates(cost: RooflineCost) -> tuple[float, float, float]:
    """The least seconds of a token's linears, of a pair in prefill, and of a token in the context
    of a decode, in batches of any size.
    """
    alone = cost.terms(StepShape(_MANY, 0, 0, 0, 1, 0)).compute_s
    paired = cost.terms(StepShape(_MANY, _MANY, 0, 0, 1, 0)).compute_s
    read_s = cost.terms(StepShape(0, 0, _MANY, _MANY)).kv_s
    return alone / _MANY, (paired - alone) / _MANY, read_s / _MANY


def _sums(seconds: Iterable[float]) -> list[float]:
    return list(accumulate(sorted(seconds)))


def _share(sums: Sequence[float], available_s: float) -> float:
    """The highest share of requests whose seconds fit the available ones."""
    return bisect_right(sums, available_s * (1 + 1e-9)) / len(sums)
