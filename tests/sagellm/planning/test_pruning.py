"""Bounds of what a placement can attain: by hand, and never below what a simulation attains."""

from dataclasses import dataclass

import pytest
from plan_tasks import plan_task

from sagellm.load.traces import PlannedRequest
from sagellm.planning.layouts import Placement, Pool
from sagellm.planning.pruning import Pruner, least_work, prompt_seconds
from sagellm.runtime.engine.costs.parallel import Parallelism
from sagellm.simulation.sweep import measure

ONE, TP2, PP2 = Parallelism(), Parallelism(2), Parallelism(1, 2)
PLACEMENTS = [
    Placement((Pool(ONE, 1),), 64, 512),
    Placement((Pool(PP2, 1),), 256, 2048),
    Placement((Pool(ONE, 1), Pool(TP2, 1)), 64, 2048),
]


@dataclass(frozen=True)
class TokenCost:
    """A second for each step, and one for each token."""

    def seconds(self, shape):
        return 1.0 + shape.num_tokens


def test_a_prompt_alone_takes_its_steps():
    assert prompt_seconds(TokenCost(), 10, 4) == 10 + 3


def test_blocks_that_were_there_before_need_no_work():
    workload = [
        PlannedRequest(0.0, 1100, 11, (1, 2)),
        PlannedRequest(1.0, 1300, 1, (1, 2)),
        PlannedRequest(2.0, 1300, 1, (3, 2)),
    ]
    assert [one.uncached for one in least_work(workload)] == [1100, 1300 - 1024, 1300]
    assert least_work(workload)[0].context == 1100 + 5


@pytest.mark.parametrize("placement", PLACEMENTS, ids=lambda one: one.layout)
@pytest.mark.parametrize(
    ("slo", "rate"),
    [
        ("ttft=0.06,tpot=0.0058", 5),
        ("ttft=0.04", 5),
        ("ttft=0.1,tpot=0.02", 200),
        ("ttft=0.05,tpot=0.007", 60),
    ],
)
def test_no_simulation_attains_more(placement, slo, rate):
    load = f"rate={rate},requests=60,input=lognormal:2500:0.8,output=exponential:60"
    task = plan_task(slo=slo, load=load)
    ceiling = Pruner(task).ceiling(placement)
    assert measure(task.point(placement, task.workload)).slo_attainment <= ceiling.share


def test_stages_share_the_context_of_one_long_request():
    """Alone, its tokens take 10.6 ms; beside short requests, 8.2 ms."""
    short = [PlannedRequest(0.0, 50, 600) for _ in range(8)]
    task = plan_task(slo="tpot=0.0095", workload=[*short, PlannedRequest(1.0, 60_000, 50)])
    placement = Placement((Pool(Parallelism(1, 4), 1),), 64, 65_536)
    attained = measure(task.point(placement, task.workload)).slo_attainment
    assert attained == 1.0
    assert Pruner(task).ceiling(placement).share == 1.0


def test_what_bounds_a_placement_is_named():
    slow = Pruner(plan_task(slo="ttft=0.001")).ceiling(PLACEMENTS[0])
    assert (slow.share, slow.bound) == (0.0, "TTFT of requests alone")
    slow = Pruner(plan_task(slo="ttft=1,tpot=0.001")).ceiling(PLACEMENTS[0])
    assert slow.bound == "TPOT of requests alone"
    assert slow.share == 1 / 60  # an answer of one token has no TPOT
    flood = "rate=100000,requests=200,input=4000,output=2"
    full = Pruner(plan_task(slo="ttft=1", load=flood)).ceiling(PLACEMENTS[0])
    assert full.bound == "compute of prompts"
    # 4,000 tokens of 2 * 6.98e9 operations at 0.8 * 989e12 a second, and their attention.
    assert full.share == pytest.approx(1 / (4000 * 1.765e-5 + 8e6 * 1.06e-9) / 200, rel=0.1)


def test_answers_of_a_split_are_bound_by_reading_kv():
    """199 tokens of 2 * 6.98e9 operations, each with 6,099 tokens of 131,072 bytes to read."""
    load = "rate=1e6,requests=2000,input=6000,output=200"
    task = plan_task(slo="ttft=60,tpot=0.02", load=load)
    full = Pruner(task).ceiling(Placement((Pool(ONE, 8), Pool(ONE, 1)), 256, 8192))
    assert full.bound == "memory bandwidth and compute of answers"
    token_s = 2 * 6.98e9 / (0.8 * 989e12) + 6099 * 131072 / (0.75 * 3.35e12)
    assert full.share == pytest.approx((60 + 0.02 * 200) / (199 * token_s) / 2000, rel=0.01)
