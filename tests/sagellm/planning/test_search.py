"""The search: it finds what trying everything finds, with fewer simulations of the whole trace."""

from itertools import pairwise, product
from math import prod

import pytest
from msgspec.structs import replace
from plan_tasks import plan_task

from sagellm.load.traces import PlannedRequest
from sagellm.planning import search as module
from sagellm.planning.layouts import Placement, SearchAxes, groups, layouts
from sagellm.planning.search import Search, resampled
from sagellm.simulation.figures import SimulationSummary
from sagellm.simulation.sweep import measure, measure_all

AXES = SearchAxes((64,), (512, 4096), ("fifo",))
LOADS = {
    "a long prompt lets others wait": (
        "ttft=0.35,tpot=0.014,attainment=0.95",
        "rate=8,requests=50,input=lognormal:3000:0.9,output=exponential:60",
    ),
    "one device is too slow": (
        "ttft=0.3,tpot=0.006",
        "rate=12,requests=40,input=lognormal:1500:0.5,output=exponential:40",
    ),
    "one device does": (
        "ttft=1,tpot=0.02",
        "rate=8,requests=40,input=lognormal:1500:0.5,output=exponential:40",
    ),
}


def measured(points):
    return measure_all(points, 1, [], lambda: None)


def everything(task, num_gpus):
    """The figures of all placements that fit, without pruning."""
    usable = tuple(one for one in groups(num_gpus, task.facts) if not task.fit(one).misfit)
    every = (pools for number in range(1, num_gpus + 1) for pools in layouts(number, usable))
    limits = list(product(AXES.max_num_seqs, AXES.max_num_batched_tokens, AXES.policies))
    placements = [Placement(pools, *values) for pools in every for values in limits]
    return {one: measure(task.point(one, task.workload)) for one in placements}


_QUICK = "one device does"


@pytest.mark.parametrize(
    "case", [_QUICK, *(pytest.param(one, marks=pytest.mark.soak) for one in LOADS if one != _QUICK)]
)
def test_the_search_finds_what_trying_everything_finds(case, monkeypatch):
    monkeypatch.setattr(module, "_FIRST_RUNG", 16)
    slo, load = LOADS[case]
    task = plan_task(slo=slo, load=load)
    found = Search(task, 2, AXES, measured).run(0)
    met = {
        one: summary for one, summary in everything(task, 2).items() if task.level.is_met(summary)
    }
    least = min(summary.cost for summary in met.values())
    cheap = {one for one, summary in met.items() if summary.cost <= least * 1.02}
    assert found.winner.placement in cheap
    highest = max(met[one].slo_attainment for one in cheap)
    assert found.winner.attained == highest
    assert found.num_simulations < 10 * 3


@pytest.mark.soak
def test_a_search_again_finds_the_same():
    slo, load = LOADS[_QUICK]
    first, second = (
        Search(plan_task(slo=slo, load=load), 2, AXES, measured).run(2) for _ in range(2)
    )
    assert first == second
    assert len(first.certainty.attained) == 2


def fake(attained, costs=None):
    """Attainments and costs by number of devices, without simulating. Without `costs`, the cost is
    devices * seconds of the trace.
    """
    seen = []

    def figures(points):
        found = []
        for point in points:
            graph, workload = point.point.document.graph, point.point.workload
            engines = [dict(one) for one in graph.engines.values()]
            sizes = [
                prod(one.get(f"{kind}_parallel_size", 1) for kind in ("tensor", "pipeline"))
                * one["replicas"]
                for one in engines
            ]
            seen.append((sum(sizes), len(workload)))
            cost = sum(sizes) * workload[-1].at_s if costs is None else costs[sum(sizes)]
            found.append(summary(attained[sum(sizes)], cost))
        return found

    return figures, seen


def summary(attained, cost):
    values = dict.fromkeys(SimulationSummary.__struct_fields__)
    return SimulationSummary(
        **{**values, "slo_attainment": attained, "cost": cost, "refusals": {}, "engines": []}
    )


LAZY = [PlannedRequest(float(number), 100, 10) for number in range(60)]
FEW = SearchAxes((64,), (512,), ("fifo",))


def lazy_search(attained, num_gpus, costs=None):
    figures, seen = fake(attained, costs)
    task = plan_task(slo="ttft=5,tpot=1", workload=LAZY)
    found = Search(task, num_gpus, FEW, figures)
    return found, seen


def test_more_devices_are_not_simulated_once_fewer_do():
    search, seen = lazy_search({1: 0.5, 2: 0.95, 3: 1.0, 4: 1.0}, 4)
    found = search.run(0)
    assert found.winner.placement.num_gpus == 2
    assert found.num_dearer == len(
        [1 for number in (3, 4) for _ in search._placements(number, search._usable())]
    )
    assert {number for number, _ in seen} == {1, 2, 4}  # four for the advice, which uses all


def test_more_devices_may_cost_less_where_fewer_end_late():
    """Two devices cost at least 118 s of a device: less than one that ends at 160 s."""
    search, _ = lazy_search({1: 0.95, 2: 0.95}, 2, {1: 160.0, 2: 120.0})
    assert search.run(0).winner.placement.num_gpus == 2


def test_the_cheapest_wins_though_a_dearer_one_is_in_time_more_often():
    search, seen = lazy_search({1: 0.92, 2: 1.0}, 2, {1: 130.0, 2: 140.0})
    found = search.run(0)
    assert {number for number, _ in seen} == {1, 2}
    assert found.winner.placement.num_gpus == 1
    assert found.runners_up[0].placement.num_gpus == 2


def test_among_equal_costs_the_one_in_time_more_often_wins():
    search, _ = lazy_search({1: 0.92, 2: 1.0}, 2, {1: 130.0, 2: 132.0})
    assert search.run(0).winner.placement.num_gpus == 2


def test_nothing_meets_the_level():
    search, _ = lazy_search({1: 0.2, 2: 0.6}, 2)
    found = search.run(3)
    assert found.winner is None
    assert found.certainty is None
    assert (found.nearest.placement.num_gpus, found.nearest.attained) == (2, 0.6)


def test_long_traces_are_simulated_in_parts_first(monkeypatch):
    monkeypatch.setattr(module, "_FIRST_RUNG", 6)
    search, seen = lazy_search({1: 0.95}, 1)
    search.run(0)
    assert [length for _, length in seen] == [6, 24, 60, 60]  # the last is the advice


def test_advice_that_does_not_fit_says_why():
    figures, _ = fake({1: 1.0, 2: 1.0})
    task = plan_task("llama-3-70b", slo="ttft=5,tpot=1", workload=LAZY)
    found = Search(task, 2, FEW, figures).run(0)
    (advice,) = found.advice
    assert (advice.layout, advice.reason) == ("TP4 x PP2", "needs 8 devices")


def test_resampled_traces_have_the_windows_of_the_trace():
    workload = [replace(one, input_len=100 + number) for number, one in enumerate(LAZY)]
    found = resampled(workload, 1)
    assert found == resampled(workload, 1) != resampled(workload, 2)
    assert [one.at_s for one in found] == sorted(one.at_s for one in found)
    lengths = [one.input_len for one in found]
    pairs = sum(after == before + 1 for before, after in pairwise(lengths))
    assert pairs >= len(found) - 10  # neighbours stay neighbours, but between windows
    assert len(set(lengths)) < len(lengths)  # some windows come twice


def test_a_window_that_comes_again_shares_no_prefix_with_itself():
    workload = [replace(one, block_ids=(number,)) for number, one in enumerate(LAZY)]
    blocks = [one.block_ids[0] for one in resampled(workload, 1)]
    assert len(set(blocks)) == len(blocks)
