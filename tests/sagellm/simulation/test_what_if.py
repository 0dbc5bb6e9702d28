"""The requests of a log, simulated as the graph was and with other options."""

import json

import pytest

from sagellm.cli import main
from sagellm.graphs.text.yaml import load
from sagellm.load.traces import PlannedRequest
from sagellm.opening.decisions import DecisionFile
from sagellm.runtime.core.decision_log import DecisionReader
from sagellm.simulation.simulation_run import SimulationPoint, simulate
from sagellm.simulation.what_if import what_if

GRAPH = """
sagellm: 1
name: one
engines:
  g: {kind: modelled, model: 'null', max_num_seqs: 1, prefill_token_s: 0.001, decode_step_s: 0.01}
operators:
  sort:     {op: policy_sort}
  generate: {op: generate, engine: g}
  metrics:  {op: metrics_sink}
edges:
  - source -> sort -> generate -> metrics -> sink
"""
# One at a time: the second, which is long, lets the third wait.
WORKLOAD = [
    PlannedRequest(3.0, 600, 5, block_ids=(1,)),
    PlannedRequest(3.1, 900, 5),
    PlannedRequest(3.2, 700, 5, block_ids=(1,), user_id="u", priority=0, slo_ttft_s=2.0),
]


@pytest.fixture
def log(tmp_path):
    found = tmp_path / "decisions"
    document = load(GRAPH, file="one.yaml")
    simulate(SimulationPoint(document, WORKLOAD, decisions=DecisionFile(found)))
    return found


def compared(log, overrides):
    with log.open("rb") as file:
        return what_if(DecisionReader(file), overrides)


def test_as_it_was_it_takes_the_recorded_times(log):
    for one in compared(log, {}):
        assert one.as_it_was.e2e_s == pytest.approx(one.path.e2e_s)
        assert one.as_it_was.ttft_s == pytest.approx(one.path.ttft_s)
        assert one.gain_s == 0.0


def test_the_request_is_played_with_all_that_decides(log):
    *_, third = compared(log, {})
    assert (third.as_it_was.input_len, third.as_it_was.num_tokens) == (700, 5)
    assert (third.as_it_was.user_id, third.as_it_was.priority) == ("u", 0)
    assert third.as_it_was.slo_ttft_s == 2.0
    assert third.as_it_was.num_cached_tokens == 512  # the prefix that the first has left


def test_other_options_have_a_cost_and_a_gain(log):
    first, second, third = compared(log, {"sort.policy": "priority"})
    assert first.gain_s == 0.0
    assert second.gain_s < 0.0 < third.gain_s


def test_the_command_shows_three_runs(log, capsys):
    assert main(["replay", str(log), "--with", "sort.policy=priority"]) == 0
    shown = capsys.readouterr().out
    assert [word in shown for word in ("recorded", "simulated", "changed")] == [True] * 3
    assert "would gain most: 2" in shown
    assert main(["replay", str(log), "--with", "sort.policy=priority", "--json"]) == 0
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [one["request_id"] for one in found] == ["0", "1", "2"]
    assert found[2]["gain_s"] > 0


@pytest.mark.parametrize(
    ("options", "cause"),
    [
        (("--with", "sort.policy=fifo", "--set", "sort.policy=fifo"), "give one of them"),
        (("--profile", "h100"), "nothing is simulated"),
        (("--with", "sort.policy=fifos"), "fifo"),
    ],
)
def test_mistakes_have_a_cause(log, capsys, options, cause):
    assert main(["replay", str(log), *options]) == 2
    assert cause in capsys.readouterr().err
