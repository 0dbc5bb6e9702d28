"""What shadows would have decided otherwise, replayed from a log, and what is known of the cost."""

import json

import pytest

from sagellm.cli import main
from sagellm.experiments.disagreements import has_shadows, shadow_report
from sagellm.graphs.diagnostics import GraphError
from sagellm.graphs.text.yaml import load
from sagellm.load.traces import PlannedRequest
from sagellm.opening.decisions import DecisionFile
from sagellm.runtime.registry import FUNCTIONS
from sagellm.simulation.simulation_run import SimulationPoint, simulate

GRAPH = """
sagellm: 1
name: one
engines:
  g: {kind: modelled, model: 'null', max_num_seqs: 1, prefill_token_s: 0.001, decode_step_s: 0.01}
operators:
  admission: {op: admission, max_queued: 100}
  sort:      {op: policy_sort}
  generate:  {op: generate, engine: g}
edges:
  - source -> admission -> sort -> generate -> sink
"""
# One at a time. The second, which is long, lets the third wait.
WORKLOAD = [
    PlannedRequest(3.0, 600, 5),
    PlannedRequest(3.1, 900, 5, slo_ttft_s=1.0),
    PlannedRequest(3.2, 300, 5, slo_ttft_s=1.0),
]


def logged(tmp_path, text=GRAPH, workload=WORKLOAD):
    log = tmp_path / "decisions"
    simulate(SimulationPoint(load(text, file="one.yaml"), workload, decisions=DecisionFile(log)))
    return log


def test_an_order_says_how_long_the_other_request_still_waited(tmp_path):
    log = logged(tmp_path)
    report = shadow_report(log, FUNCTIONS, {"sort.policy": "cost_optimized"})
    (node,) = report.nodes
    assert (node.node, node.kind, node.num_decisions, node.fault) == ("sort", "order", 3, "")
    (found,) = report.differences
    assert (found.note.request_id, found.note.live, found.note.shadow) == ("1", "sent", "2")
    # The second request takes 0.9 s of prefill, and some steps of 0.01 s.
    assert found.waited_s == pytest.approx(0.95, abs=0.02)
    assert "2 waited 9" in found.known
    assert found.known.endswith(", late")


def test_a_refusal_says_what_became_of_the_request(tmp_path):
    log = logged(tmp_path)
    report = shadow_report(log, FUNCTIONS, {"admission.max_queued": 1})
    (found,) = report.differences
    assert (found.note.request_id, found.note.shadow) == ("2", "queue_full")
    assert found.path.num_tokens == 5
    assert "late, 300 + 5 tokens computed" in found.known
    (tally,) = report.nodes[0].tallies
    assert tally.outcomes == {"missed": 1}


def test_the_shadows_of_the_graph_are_replayed_as_they_were(tmp_path):
    text = GRAPH.replace("op: policy_sort", "op: policy_sort, shadow: {policy: cost_optimized}")
    log = logged(tmp_path, text)
    assert has_shadows(log)
    of_graph = shadow_report(log, FUNCTIONS)
    asked = shadow_report(logged(tmp_path), FUNCTIONS, {"sort.policy": "cost_optimized"})
    assert of_graph.differences == asked.differences
    assert [node.num_decisions for node in of_graph.nodes] == [3]


def test_what_has_not_ended_says_so(tmp_path):
    log = logged(tmp_path)
    content = log.read_bytes()
    log.write_bytes(content[: int(len(content) * 0.75)])
    report = shadow_report(log, FUNCTIONS, {"sort.policy": "cost_optimized"})
    assert report.is_cut
    (found,) = report.differences
    assert found.path is None
    assert found.known == "not ended in the log"


def test_options_that_decide_nothing_are_named(tmp_path):
    overrides = {"g.max_num_seqs": 2, "sort.policy": "priority"}
    report = shadow_report(logged(tmp_path), FUNCTIONS, overrides)
    assert report.unplayed == ("g.max_num_seqs",)
    assert [node.node for node in report.nodes] == ["sort"]


def test_a_strategy_that_reads_prefixes_says_that_the_log_has_none(tmp_path):
    text = GRAPH.replace("  generate:", "  route: {op: route}\n  generate:")
    log = logged(tmp_path, text.replace("-> generate ->", "-> route -> generate ->"))
    report = shadow_report(log, FUNCTIONS, {"route.strategy": "prefix_aware"})
    assert [node.is_blind for node in report.nodes] == [True]
    report = shadow_report(log, FUNCTIONS, {"route.strategy": "random"})
    assert [node.is_blind for node in report.nodes] == [False]


@pytest.mark.parametrize(
    ("target", "said"),
    [("srot.policy", "did you mean sort?"), ("sort.polcy", "did you mean `policy`?")],
)
def test_unknown_names_are_refused_with_the_nearest(tmp_path, target, said):
    with pytest.raises(GraphError) as raised:
        shadow_report(logged(tmp_path), FUNCTIONS, {target: "fifo"})
    assert said in (raised.value.diagnostics[0].hint or "")


def test_options_of_a_policy_are_set_one_by_one(tmp_path):
    text = GRAPH.replace("op: policy_sort", "op: policy_sort, policy: fair")
    report = shadow_report(
        logged(tmp_path, text), FUNCTIONS, {"sort.policy_options.quantum_tokens": 64}
    )
    assert [node.num_decisions for node in report.nodes] == [3]


def test_replay_shows_the_shadows_of_the_graph(tmp_path, capsys):
    text = GRAPH.replace("op: policy_sort", "op: policy_sort, shadow: {policy: cost_optimized}")
    log = logged(tmp_path, text)
    assert main(["replay", str(log)]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("identical: ")
    assert "1 (33.3%)" in shown
    assert "sort: 1 sent, not 2: 2 waited 9" in shown
    assert main(["replay", str(log), "--most", "0"]) == 0
    assert "not 2" not in capsys.readouterr().out
    assert main(["replay", str(log), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["difference"] is None
    assert found["shadows"][0]["disagreements"][0]["outcomes"] == {"missed": 1}
    assert found["differences"][0]["shadow"] == "2"
    assert found["differences"][0]["outcome"]["ttft_slack_s"] < 0


def test_with_compares_each_decision_and_simulates_both(tmp_path, capsys):
    log = logged(tmp_path)
    assert main(["replay", str(log), "--with", "sort.policy=cost_optimized"]) == 0
    shown = capsys.readouterr().out
    assert "1 (33.3%)" in shown
    assert "would gain most: 2" in shown
    assert main(["replay", str(log), "--with", "sort.policy=cost_optimized", "--json"]) == 0
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [len(one["differences"]) for one in found] == [0, 1, 0]


def test_a_broken_shadow_is_named_with_its_error(tmp_path, monkeypatch, capsys):
    text = GRAPH.replace(
        "  generate:", "  route: {op: route, shadow: {strategy: random}}\n  generate:"
    )
    log = logged(tmp_path, text.replace("-> generate ->", "-> route -> generate ->"))

    def broken(router, before, own, sent):
        raise RuntimeError("broken")

    monkeypatch.setattr("sagellm.operators.route.Router.followed", broken)
    assert main(["replay", str(log)]) == 1  # the log has no such fault
    shown = capsys.readouterr().out
    assert "route: its shadow was switched off by RuntimeError('broken')" in shown
    assert "route.shadow" in shown
