"""The ground truth of simulations: what is compared, and that the simulator meets it."""

import json
from itertools import pairwise

import pytest

from benchmarks.simulation_truth import (
    GRAPHS,
    Cell,
    Times,
    at_rate,
    compared,
    errors,
    figures,
    keep,
    read_truth,
    scaled,
    table,
)
from sagellm.graphs.text.yaml import load_file
from sagellm.load.traces import PlannedRequest
from sagellm.opening.graph_engines import engine_options

PROFILE = "epyc-zen5-llama15m"
REQUESTS = [(0.1 * number, 50 + number, 5, []) for number in range(20)]


def cell(others=0.01, times=None, **fields):
    found = times or [(10.0, 20.0)] * len(REQUESTS)
    return Cell("joint", "azure", 0.3, 10.0, [others], REQUESTS, found, **fields)


def test_errors_are_relative_to_what_was_measured():
    real = [Times(float(number), 0.1, 1.0) for number in range(10)]
    other = [Times(float(number), 0.1 + 0.01 * number, 0.9) for number in range(10)]
    found = errors(real, other)
    assert found["ttft_p50_ms"] == pytest.approx(0.4, abs=0.06)
    assert found["e2e_p99_ms"] == pytest.approx(-0.1)
    assert found["throughput_rps"] == pytest.approx(10 / 9.9 / 1.0 - 1, abs=1e-3)
    assert found["each_ttft"] == pytest.approx(0.45)
    assert found["each_e2e"] == pytest.approx(0.1)


def test_equal_runs_have_no_error():
    real = [Times(float(number), 0.1 + number, 2.0 + number) for number in range(10)]
    assert set(errors(real, real).values()) == {0.0}


def test_throughput_counts_until_the_last_end():
    times = [Times(0.0, 0.1, 9.0), Times(1.0, 0.1, 1.0)]
    assert figures(times)["throughput_rps"] == pytest.approx(2 / 9, abs=1e-3)


def test_the_first_requests_are_played_at_a_rate():
    planned = [PlannedRequest(3.0 * number, 10, 10) for number in range(1, 200)]
    found = at_rate(planned, 20.0, 5.0)
    assert len(found) == 100
    assert found[-1].at_s == pytest.approx(5.0)
    gaps = [after.at_s - before.at_s for before, after in pairwise(found)]
    assert max(gaps) == pytest.approx(min(gaps), abs=1e-4)


def test_scaled_prompts_share_whole_blocks(tmp_path):
    line = {"timestamp": 0, "input_length": 11_000, "output_length": 50, "hash_ids": [*range(22)]}
    trace = tmp_path / "mooncake.jsonl"
    trace.write_text(json.dumps(line))
    (one,) = scaled(trace)
    assert (one.input_len, one.output_len, len(one.block_ids)) == (1100, 10, 2)


def test_a_trace_without_a_scale_is_refused(tmp_path):
    with pytest.raises(SystemExit, match="no scale is known"):
        scaled(tmp_path / "other.csv")


def test_a_cell_is_replaced_by_one_that_was_disturbed_less(tmp_path):
    file = tmp_path / "truth.json"
    for others in (0.3, 0.1, 0.2):
        keep(file, cell(others))
    keep(file, Cell("pd", "azure", 0.3, 1.0, [0.5], [], []))
    assert [one.others_cpus for one in read_truth(file).cells] == [[0.1], [0.5]]


@pytest.mark.parametrize("graph", GRAPHS)
def test_the_graphs_are_of_real_engines_with_one_thread(graph):
    document = load_file(GRAPHS[graph])
    for name in document.graph.engines:
        options = engine_options(document.graph, name)
        assert (options.threads, options.num_blocks) == (1, 4096)


def test_a_cell_is_simulated_and_shown():
    found = compared(cell(again=[(11.0, 20.0)] * len(REQUESTS)), PROFILE, 3)
    low, high = found["over_seeds"]["ttft_p50_ms"]
    assert 0 < low <= found["simulated"]["ttft_p50_ms"] <= high
    assert found["floor"]["ttft_p50_ms"] == pytest.approx(0.1)
    head, rule, first, floor = table([found])
    assert head.count("|") == rule.count("|") == first.count("|") == floor.count("|")
