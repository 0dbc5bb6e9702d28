"""Replicas that come and go in simulated time: no oscillation, no lost token, equal decisions."""

from functools import cache, partial
from itertools import pairwise
from pathlib import Path
from random import Random

import pytest
from simulated_graphs import JOINT, OPTIONS, Simulation, random_workload

from sagellm.graphs.text.yaml import load
from sagellm.load.report import Objective
from sagellm.load.workload import PlannedRequest, read_workload
from sagellm.opening.decisions import DecisionFile, replay
from sagellm.runtime.core.effects import ScaleTo
from sagellm.runtime.simulation.executor import SimulatedScaling
from sagellm.runtime.simulation.opening import open_simulated
from sagellm.runtime.simulation.prompts import TraceHasher
from sagellm.simulation.faults import ReplicaFault
from sagellm.simulation.figures import summarise
from sagellm.simulation.simulation_run import SimulationPoint, simulate

# One replica serves about 1.6 requests a second: 8 at a time, each of 200 tokens.
ENGINE = """{kind: modelled, model: "null", replicas: %d, max_num_seqs: 8, num_blocks: 1024,
      prefill_token_s: 0.0002, decode_step_s: 0.02, decode_row_s: 0.0005}"""
SCALED = """
sagellm: 1
name: scaled
engines:
  g: ENGINE
operators:
  autoscale: {op: autoscale, engines: {g: {min: 1, max: 10, start_s: 20}}, slo_ttft_s: 1.0}
  sort:      {op: policy_sort, policy: fifo}
  route:     {op: route, strategy: load_balanced}
  generate:  {op: generate, engine: g}
edges:
  - source -> autoscale -> sort -> route -> generate -> sink
executor: {kind: processes}
""".replace("ENGINE", ENGINE % 1)
FIXED = SCALED.replace("replicas: 1", "replicas: 10").replace("source -> autoscale", "source")
FIXED = "\n".join(line for line in FIXED.splitlines() if "op: autoscale" not in line)
LENGTHS = "input=256,output=200"


def steps(*parts):
    """Poisson arrivals whose rate changes: (rate, seconds) one after the other."""
    draw, at_s, begun_s, planned = Random("steps"), 0.0, 0.0, []
    for rate, seconds in parts:
        at_s, begun_s = max(at_s, begun_s), begun_s + seconds
        while rate and (at_s := at_s + draw.expovariate(rate)) < begun_s:
            planned.append(PlannedRequest(at_s, 256, 200))
    return tuple(planned)


WORKLOADS = {
    "diurnal": f"arrivals=diurnal,amplitude=0.9,period_s=1800,rate=6,{LENGTHS},seconds=1800",
    "bursty": f"arrivals=gamma,cv=2,rate=5,{LENGTHS},seconds=1200",
}
SHAPES = {
    "step": ((1.0, 300), (8.0, 600), (1.0, 900)),
    "near a threshold": ((2.56, 1800),),  # two replicas at 0.8 of their capacity
    "square wave": ((1.0, 120), (3.0, 120)) * 8,
}


@cache
def workload(name):
    if name in SHAPES:
        return steps(*SHAPES[name])
    return tuple(read_workload(f"synthetic:{WORKLOADS[name]}"))


@cache
def played(name, *, is_fixed=False, text=None):
    begun = SCALED if name in SHAPES else SCALED.replace("replicas: 1", "replicas: 4")
    document = load(text or (FIXED if is_fixed else begun), file="graph.yaml")
    run = simulate(SimulationPoint(document, workload(name)))
    return run, summarise(run, Objective(ttft_s=1.0), {})


def counts(run):
    """(time, replicas) while requests came; afterwards all but one go."""
    last_s = max(one.arrived_s for one in run.requests)
    return [(at_s, count) for at_s, count in run.counts["g"] if at_s <= last_s]


def num_turns(run):
    directions = [after > before for (_, before), (_, after) in pairwise(counts(run))]
    return sum(one != other for one, other in pairwise(directions))


def counts_at(run, at_s):
    return [count for since_s, count in counts(run) if since_s <= at_s][-1]


def most_between(run, begun_s, ended_s):
    return max(count for at_s, count in counts(run) if begun_s <= at_s < ended_s)


@pytest.mark.parametrize(
    ("name", "turns", "lost", "saved"),
    [
        ("step", 2, 0.07, 0.5),  # no replica comes within the first 30 s, in which 4 % arrive
        ("diurnal", 3, 0.02, 0.33),
        ("bursty", 4, 0.07, 0.3),  # bursts are over before a replica has started
        ("near a threshold", 3, 0.03, 0.6),
        ("square wave", 4, 0.03, 0.6),
    ],
)
def test_replicas_follow_the_load_and_do_not_oscillate(name, turns, lost, saved):
    run, found = played(name)
    _, fixed = played(name, is_fixed=True)
    assert found.served == found.requests == fixed.served
    assert num_turns(run) <= turns
    assert found.slo_attainment >= fixed.slo_attainment - lost
    assert found.replica_hours["g"] <= (1 - saved) * fixed.replica_hours["g"]


def test_a_step_gets_its_replicas_and_gives_them_back():
    run, _ = played("step")
    assert most_between(run, 300, 360) >= 8  # eight a second, and those that wait
    assert 7 <= counts_at(run, 800) <= 8  # eight a second alone need 6.25 at 0.8
    assert counts(run)[-1][1] <= 2
    assert all(1 <= count <= 10 for _, count in run.counts["g"])
    assert run.counts["g"][-1][1] == 1  # at the end nothing is left to do


def test_a_steady_load_near_a_threshold_leaves_the_number_alone():
    run, _ = played("near a threshold")
    assert len(counts(run)) <= 6


def test_equal_inputs_give_equal_replicas_and_times():
    planned = steps((1.0, 60), (6.0, 120))
    one, other = (simulate(SimulationPoint(load(SCALED, file="g"), planned)) for _ in "ab")
    assert len(one.counts["g"]) > 3
    assert one.counts == other.counts
    assert [request.ended_s for request in one.requests] == [
        request.ended_s for request in other.requests
    ]


def test_a_replay_decides_the_same_number_of_replicas(tmp_path: Path):
    log = tmp_path / "decisions"
    point = SimulationPoint(
        load(SCALED, file="g"), steps((4.0, 60), (0.5, 150)), decisions=DecisionFile(log)
    )
    run = simulate(point)
    assert len(run.counts["g"]) >= 4
    assert replay(log, functions={}).difference is None
    found = replay(log, functions={}, overrides={"autoscale.target_load": 0.95})
    assert found.difference is not None
    assert any(effect[0] == "scale_to" for effect in found.difference.replayed)


def test_a_drain_that_takes_too_long_moves_the_rest_without_losing_a_token():
    text = SCALED.replace("start_s: 20", "start_s: 5, drain_s: 0").replace(
        "slo_ttft_s: 1.0", "slo_ttft_s: 1.0, cool_down_s: 20, interval_s: 5"
    )
    run, found = played("square wave", text=text)
    assert found.served == found.requests
    assert all(request.num_tokens == 200 for request in run.requests)
    assert any(count < before for (_, before), (_, count) in pairwise(counts(run)))


def test_an_operator_of_a_user_may_scale_an_engine_without_bounds():
    simulation = Simulation(JOINT)
    links, hasher = simulation.links, TraceHasher()
    scaling = SimulatedScaling(
        simulation.executor,
        {},
        lambda place: open_simulated(OPTIONS, place, simulation.timeline, links, hasher),
    )
    simulation.executor.scale = scaling.begin
    for at_s, count, before in ((1.0, 3, 2), (40.0, 1, 3), (80.0, 2, 1)):
        asked = ScaleTo("g", count, before, "own")
        simulation.timeline.at(at_s, partial(scaling.begin, asked))
    outcome = simulation.run(random_workload(300, 4.0))
    assert {seen.end for seen in outcome.seen.values()} == {"length"}
    assert [count for _, count in scaling.counts["g"]] == [2, 3, 1, 2]
    assert len(simulation.executor.engines["g"]) == 3  # the number of a removed one is used again
    steps_of = [engine.load.num_steps for engine in simulation.executor.engines["g"]]
    assert all(steps_of)


SPLIT = """
sagellm: 1
name: split
engines:
  p: {kind: modelled, model: "null", num_blocks: 2048, max_num_batched_tokens: 2048, PREFILL}
  d: {kind: modelled, model: "null", num_blocks: 1024, DECODE}
operators:
  autoscale: {op: autoscale, engines: {p: {max: 5}, d: {max: 8}}, slo_ttft_s: 2.0}
  sort:      {op: policy_sort, policy: fifo}
  route:     {op: route, strategy: load_balanced}
  prefill:   {op: prefill, engine: p}
  transfer:  {op: kv_transfer}
  decode:    {op: decode, engine: d}
edges:
  - source -> autoscale -> sort -> route -> prefill -> transfer -> decode -> sink
executor: {kind: processes}
"""


@pytest.mark.parametrize(
    ("cost", "busy", "idle"),
    [("prefill_token_s: 0.0001", "d", "p"), ("prefill_token_s: 0.003", "p", "d")],
)
def test_the_role_that_is_the_bottleneck_gets_the_replicas(cost, busy, idle):
    text = SPLIT.replace("PREFILL", cost)
    text = text.replace("DECODE", f"decode_step_s: 0.02, max_num_seqs: {8 if busy == 'd' else 64}")
    output = 300 if busy == "d" else 20
    planned = [PlannedRequest(0.5 * number, 512, output) for number in range(1200)]
    run = simulate(SimulationPoint(load(text, file="g"), planned))
    most = {name: max(count for _, count in run.counts[name]) for name in "pd"}
    assert most[busy] >= 2
    assert most[idle] == 1
    assert {request.end for request in run.requests} == {"length"}


def test_a_replica_that_was_removed_cannot_die_and_come_back():
    planned = steps((4.0, 60), (0.2, 400))
    faults = (ReplicaFault("g", 1, 300.0, 5.0),)
    text = SCALED.replace("replicas: 1", "replicas: 2")
    run = simulate(SimulationPoint(load(text, file="g"), planned, faults=faults))
    assert counts(run)[-1][1] == 1
    assert counts(run)[-1][0] < 300.0
    idle = run.engines["g"][1].model
    assert idle.load.num_steps == 0 or idle.busy_s < 300.0
    late = simulate(SimulationPoint(load(text, file="g"), planned))
    assert [one.ended_s for one in run.requests] == [one.ended_s for one in late.requests]


def test_a_replica_that_dies_again_and_again_does_not_fill_the_pool():
    faults = tuple(ReplicaFault("g", 0, 100.0 + 20 * n, 19.0) for n in range(40))
    planned = steps((1.0, 900))
    run = simulate(SimulationPoint(load(SCALED, file="g"), planned, faults=faults))
    assert max(count for _, count in run.counts["g"]) <= 3
    assert {request.end for request in run.requests} == {"length"}
