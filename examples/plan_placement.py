"""The number of devices for objectives of 1 s and 40 ms a token, and what bounds the answer.

The programs `sagellm plan` and `sagellm explain` do this from a command line.
"""

from pathlib import Path
from tempfile import TemporaryDirectory

from sagellm.load.synthetic import parse_synthetic
from sagellm.planning.bottlenecks import explain
from sagellm.planning.layouts import SearchAxes
from sagellm.planning.plan_task import PlanTask
from sagellm.planning.search import Search
from sagellm.planning.service_level import parse_service_level
from sagellm.runtime.engine.costs.profile import read_profile
from sagellm.runtime.models.shapes import SHAPES
from sagellm.simulation.sweep import measure

LOAD = "synthetic:rate=5,requests=60,input=lognormal:1500:0.6,output=exponential:100"

task = PlanTask(
    model="llama-3-70b",
    facts=SHAPES["llama-3-70b"],
    profile_name="h100-sxm",
    profile=read_profile("h100-sxm"),
    memory_bytes=80e9,
    memory_utilization=0.9,
    kv_bytes_per_s=450e9,
    level=parse_service_level("ttft=1,tpot=0.04"),
    workload=list(parse_synthetic(LOAD).generate()),
    price=2.5,
)
axes = SearchAxes(max_num_seqs=(64,), max_num_batched_tokens=(512, 2048), policies=("fifo",))
found = Search(task, 8, axes, lambda points: [measure(one) for one in points]).run(num_seeds=2)
assert found.winner is not None
winner = found.winner
cost = winner.summary.cost_per_1k_tokens or 0.0
print(f"{winner.placement.name}: {winner.attained:.1%} in time, {cost * 1e3:.2f} a million tokens")
print(f"left out: TP1: {found.misfits['TP1']}")
for advice in found.advice:
    attained = f"{advice.found.attained:.1%} in time" if advice.found else advice.reason
    print(f"advised: {advice.layout}: {attained}")
with TemporaryDirectory() as folder:
    point = task.point(winner.placement, task.workload)
    explained = explain(
        point, task.level, lambda many: [measure(one) for one in many], Path(folder)
    )
for gain in explained.effects[:3]:
    change = gain.change
    print(f"{change.resource}, {change.change}: worst p99 {-gain.relief:+.0%} ({change.evidence})")
