"""The figures of a simulation follow from the times of its requests."""

import csv

import pytest
from msgspec import structs

from sagellm.graphs.text.yaml import load
from sagellm.load.report import Objective
from sagellm.load.workload import PlannedRequest
from sagellm.simulation.figures import latency, summarise, write_csv
from sagellm.simulation.simulation_run import SimulationPoint, simulate
from sagellm.simulation.sweep import over_seeds

GRAPH = """
sagellm: 1
name: one
engines:
  g: {kind: modelled, model: 'null', replicas: 2, prefill_token_s: 0.001, decode_step_s: 0.01}
operators:
  sort:     {op: policy_sort}
  route:    {op: route, strategy: round_robin}
  generate: {op: generate, engine: g}
  metrics:  {op: metrics_sink}
edges:
  - source -> sort -> route -> generate -> metrics -> sink
"""
DOCUMENT = load(GRAPH, file="one.yaml")
# One request at a time on each replica: the first token after 0.01 + n * 0.001 s, others each 0.01.
WORKLOAD = [PlannedRequest(0.0, 90, 11), PlannedRequest(0.0, 190, 21)]


def run(workload=WORKLOAD, **fields):
    return simulate(SimulationPoint(DOCUMENT, workload, **fields))


def test_times_of_a_request_are_those_of_its_steps():
    first, second = run().requests
    assert (first.ttft_s, second.ttft_s) == (pytest.approx(0.1), pytest.approx(0.2))
    assert (first.tpot_s, second.tpot_s) == (pytest.approx(0.01), pytest.approx(0.01))
    assert (first.e2e_s, second.e2e_s) == (pytest.approx(0.2), pytest.approx(0.4))
    assert second.phases.prefill_s == pytest.approx(0.2)
    assert second.phases.decode_s == pytest.approx(0.2)


def test_rates_goodput_and_cost_count_over_the_elapsed_time():
    found = summarise(run(), Objective(ttft_s=0.15), {"g": 3.0})
    assert found.elapsed_s == pytest.approx(0.4)
    assert found.requests_per_s == pytest.approx(2 / 0.4)
    assert found.output_tokens_per_s == pytest.approx(32 / 0.4)
    assert (found.goodput_rps, found.slo_attainment) == (pytest.approx(1 / 0.4), 0.5)
    assert found.cost == pytest.approx(2 * 0.4 / 3600 * 3.0)
    assert found.cost_per_1k_tokens == pytest.approx(found.cost / 32 * 1000)


def test_an_objective_of_the_request_comes_first():
    own = [structs.replace(WORKLOAD[0], slo_ttft_s=0.05), WORKLOAD[1]]
    assert summarise(run(own), Objective(ttft_s=0.3), {}).slo_attainment == 0.5
    assert summarise(run(own), None, {}).slo_attainment == 0.5
    assert summarise(run(own), Objective(ttft_s=0.1), {}).slo_attainment == 0.0


def test_the_imbalance_is_the_busiest_replica_over_the_mean():
    found = summarise(run(), None, {})
    busy = [use.busy for use in found.engines]
    assert busy == [pytest.approx(0.5), pytest.approx(1.0)]
    assert found.load_imbalance == pytest.approx(1.0 / 0.75)
    assert (found.goodput_rps, found.slo_attainment, found.prefix_hit_rate) == (None, None, None)


def test_gaps_between_tokens_are_counted_one_by_one():
    found = summarise(run(), None, {})
    assert found.itl_ms.p50 == pytest.approx(10.0, rel=0.02)
    assert found.itl_ms.max == pytest.approx(10.0, rel=0.02)


def test_refused_requests_count_with_their_code_and_not_in_latencies():
    crowded = {"sort.window": 1, "g.max_num_seqs": 1}
    document = load(
        GRAPH.replace("sort:     ", "admit: {op: admission, max_queued: 1}\n  sort:     ").replace(
            "source -> sort", "source -> admit -> sort"
        ),
        file="two.yaml",
    )
    workload = [PlannedRequest(0.001 * number, 90, 11) for number in range(8)]
    found = summarise(simulate(SimulationPoint(document, workload, crowded)), None, {})
    assert found.refusals == {"queue_full": found.requests - found.served}
    assert 0 < found.served < 8


def test_percentiles_are_interpolated():
    found = latency([0.001, 0.002, None])
    assert (found.mean, found.p50, found.max) == (1.5, 1.5, 2.0)
    assert latency([None]) is None


def test_seeds_give_means_and_deviations():
    one = summarise(run(), None, {})
    other = summarise(run([PlannedRequest(0.0, 90, 11)]), None, {})
    found = over_seeds([one, other])
    assert found["requests"].mean == 1.5
    assert found["requests"].deviation == pytest.approx(0.5**0.5)


def test_every_request_is_a_line(tmp_path):
    write_csv(tmp_path / "requests.csv", run().requests)
    with (tmp_path / "requests.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["number"] for row in rows] == ["0", "1"]
    assert float(rows[1]["ttft_s"]) == pytest.approx(0.2)
    assert float(rows[1]["decode_s"]) == pytest.approx(0.2)
