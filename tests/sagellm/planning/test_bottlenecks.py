"""What bounds a graph: each claim is confirmed by a simulation with more of the resource."""

import pytest
from plan_tasks import plan_task

from sagellm.graphs.text.yaml import load
from sagellm.load.traces import PlannedRequest
from sagellm.planning.bottlenecks import explain
from sagellm.planning.layouts import Placement, Pool
from sagellm.planning.service_level import parse_service_level
from sagellm.planning.step_use import StepUse
from sagellm.runtime.engine.costs.parallel import Parallelism
from sagellm.simulation.faults import ReplicaFault
from sagellm.simulation.simulation_run import SimulationPoint, modelled_graph, simulate
from sagellm.simulation.sweep import SweepPoint, measure_all

GRAPH = """
sagellm: 1
name: one
engines:
  g: {{kind: modelled, model: 'null', {options}}}
operators:
  admission: {{op: admission, max_queued: {max_queued}}}
  sort:      {{op: policy_sort}}
  generate:  {{op: generate, engine: g}}
  metrics:   {{op: metrics_sink}}
edges:
  - source -> admission -> sort -> generate -> metrics -> sink
"""
ROOMY = {"num_blocks": 4000, "max_num_seqs": 64, "max_num_batched_tokens": 4096}


def steady(number, every_s, input_len, output_len):
    return [PlannedRequest(n * every_s, input_len, output_len) for n in range(number)]


def measured(points):
    return measure_all(points, 1, [], lambda: None)


def explained(folder, slo, workload, *, max_queued=1000, **options):
    given = ", ".join(f"{name}: {value}" for name, value in {**ROOMY, **options}.items())
    text = GRAPH.format(options=given, max_queued=max_queued)
    level = parse_service_level(slo)
    point = SimulationPoint(load(text, file="one.yaml"), workload)
    return explain(SweepPoint({}, point, level.objective), level, measured, folder)


def gains(found):
    return {one.change.resource: one.gain for one in found.effects}


def test_slots_bound_a_graph(tmp_path):
    """Two answers at a time of 1 s each, and four requests a second."""
    found = explained(
        tmp_path, "ttft=1", steady(24, 0.25, 16, 100), max_num_seqs=2, decode_step_s=0.01
    )
    assert found.bound.change.resource == "max_num_seqs of g"
    assert found.bound.gain > 0.5
    assert "at 2" in found.bound.change.evidence
    assert gains(found)["KV capacity of g"] == 0.0
    assert found.missed["ttft"] > 0.3
    assert found.missed["tpot"] == 0.0


def test_kv_blocks_bound_a_graph(tmp_path):
    """A pool for two requests of 1,100 tokens, and slots for more."""
    found = explained(
        tmp_path, "ttft=1", steady(24, 0.25, 1000, 100), num_blocks=140, max_model_len=1104
    )
    assert found.bound.change.resource == "KV capacity of g"
    assert found.bound.change.evidence.startswith("peak 9")


def test_compute_of_prompts_bounds_a_graph(tmp_path):
    """Prompts take 0.4 s each, and four arrive a second."""
    found = explained(
        tmp_path, "ttft=1", steady(24, 0.25, 4000, 2), decode_step_s=0.001, prefill_token_s=1e-4
    )
    assert found.bound.change.resource == "compute of prompts of g"


@pytest.mark.soak
def test_prompts_that_interfere_with_answers(tmp_path):
    """A step of 4,096 prompt tokens takes 0.4 s: one token in 100 is late, and the mean is over."""
    workload = [PlannedRequest(0.0, 16, 100), *steady(3, 0.3, 4000, 2)]
    found = explained(tmp_path, "tpot=0.01", workload, decode_step_s=0.001, prefill_token_s=1e-4)
    names = [one.change.resource for one in found.effects]
    assert "prefill interference in g" in names
    assert "ms a step with prompts" in next(
        one.change.evidence for one in found.effects if "interference" in one.change.resource
    )


@pytest.mark.soak
def test_a_short_queue_bounds_a_graph(tmp_path):
    found = explained(tmp_path, "ttft=60", steady(24, 0.01, 16, 10), max_num_seqs=1, max_queued=4)
    assert gains(found)["queue of admission"] > 0.4


def test_nothing_bounds_an_idle_graph(tmp_path):
    found = explained(tmp_path, "attainment=0.5,ttft=60", steady(3, 9.0, 16, 1), max_num_seqs=1)
    assert found.summary.slo_attainment == 1.0
    assert max(gains(found).values()) == 0.0


def test_a_device_is_bound_by_memory_when_it_decodes(tmp_path):
    """Of one long answer at a time: weights are read in each step."""
    task = plan_task(slo="tpot=0.005", workload=steady(4, 1.0, 64, 100))
    point = task.point(Placement((Pool(Parallelism(), 1),)), task.workload)
    found = explain(point, task.level, measured, tmp_path)
    assert found.bound.change.resource == "memory bandwidth of g"
    assert found.bound.gain == 1.0  # none was in time, now all are
    assert "weights" in found.bound.change.evidence
    assert list(tmp_path.glob("*.json"))


@pytest.mark.parametrize("group", [Parallelism(), Parallelism(2), Parallelism(1, 2)])
def test_the_terms_of_steps_sum_to_the_busy_time(group):
    task = plan_task()
    point = task.point(Placement((Pool(group, 2),)), task.workload).point
    use = StepUse(modelled_graph(point))
    engines = simulate(SimulationPoint(point.document, task.workload, on_run=use)).engines
    steps = use.engines["g"]
    assert steps.busy_s == pytest.approx(sum(one.model.busy_s for one in engines["g"]))
    assert sum(steps.terms) == pytest.approx(steps.busy_s)
    assert steps.mixed_s + steps.decode_s + steps.prefill_s == pytest.approx(steps.busy_s)
    assert steps.num_mixed + steps.num_decodes > 0


def test_steps_after_the_death_of_a_replica_count():
    task = plan_task()
    point = task.point(Placement((Pool(Parallelism(), 2),)), task.workload).point
    use = StepUse(modelled_graph(point))
    fault = ReplicaFault("g", 0, 0.5, 0.1)
    point = SimulationPoint(point.document, task.workload, on_run=use, faults=(fault,))
    engines = simulate(point).engines["g"]
    assert use.engines["g"].busy_s == pytest.approx(sum(one.model.busy_s for one in engines))


@pytest.mark.soak
def test_a_split_has_a_link(tmp_path):
    task = plan_task()
    placement = Placement((Pool(Parallelism(), 1), Pool(Parallelism(), 1)))
    found = explain(task.point(placement, task.workload), task.level, measured, tmp_path)
    assert {"transfer link", "compute of p", "memory bandwidth of d"} <= gains(found).keys()
