"""Budgets: the share of each operator in the objectives of a request, and what it has spent."""

import json
from dataclasses import replace

import pytest
import trio
from simulated_graphs import JOINT, PD, Simulation, logged_paths, random_workload

from sagellm import Graph, Sampling, ops
from sagellm.cli import main
from sagellm.extensions import RESOLVER
from sagellm.graphs.ir import FrozenMap, freeze
from sagellm.graphs.text.yaml import load
from sagellm.tracing.critical_path import PathPhase, PathTracker, RequestPath
from sagellm.tracing.operator_budgets import BudgetMeter, budget_report, watch

SHARES = {"ttft_shares": {"sort": 0.5, "prefill": 0.25}, "slo_ttft_s": 2.0, "slo_tpot_s": 0.05}


def graph_of(text, budgets):
    graph = load(text, file="g.yaml").graph
    attrs = {**graph.attrs} if budgets is None else {**graph.attrs, "budgets": freeze(budgets)}
    return replace(graph, attrs=FrozenMap(attrs))


def meter_of(text=PD, budgets=SHARES, **objectives):
    return BudgetMeter(graph_of(text, budgets), RESOLVER.vocabulary, **objectives)


def path_of(*, slo_ttft_s=None, queue=0.4, prefill=0.8, transfer=0.1, decode=1.0):
    """A request of 21 tokens: the first comes after the transfer."""
    times = [
        ("queue", queue, ""),
        ("prefill", prefill, "prefill[1]"),
        ("transfer", transfer, "transfer[0]"),
        ("decode", decode, "decode[0]"),
    ]
    phases, now = [], 10.0
    for name, seconds, where in times:
        if seconds:
            phases.append(PathPhase(name, now, now + seconds, where))
            now += seconds
    return RequestPath(
        "r", 0, 10.0, slo_ttft_s, phases=phases, first_s=now - decode, ended_s=now, end="length",
        num_tokens=21, operators=["prefill", "transfer", "decode"],
    )  # fmt: skip


def test_explicit_shares_are_parts_of_the_objective_and_the_rest_goes_to_the_others():
    meter = meter_of()
    path = path_of()
    meter.learn(path)
    found = {(one.budget, one.operator): one for one in meter.divide(path)}
    sort, prefill = found["ttft", "sort"], found["ttft", "prefill"]
    transfer, decode = found["ttft", "transfer"], found["tpot", "decode"]
    assert (sort.share, prefill.share, transfer.share) == (0.5, 0.25, 0.25)
    assert (sort.allowed_s, prefill.allowed_s, transfer.allowed_s) == (1.0, 0.5, 0.5)
    assert sort.spent_s == pytest.approx(0.4)
    assert sort.slack_s == pytest.approx(0.6)
    assert prefill.slack_s == pytest.approx(0.6 + 0.5 - 0.8)
    assert transfer.slack_s == pytest.approx(2.0 - 1.3)  # what is left of the whole objective
    assert [one.is_missed for one in (sort, prefill, transfer)] == [False, True, False]
    assert (decode.share, decode.allowed_s) == (1.0, 0.05)
    assert decode.spent_s == pytest.approx(1.0 / 20)
    assert set(found) == {
        ("ttft", "sort"), ("ttft", "prefill"), ("ttft", "transfer"), ("tpot", "decode"),
    }  # fmt: skip


def test_the_objective_of_the_request_comes_before_that_of_the_graph():
    meter = meter_of(slo_ttft_s=9.0)
    found = meter.divide(path_of(slo_ttft_s=4.0))
    assert found[0].allowed_s == 2.0


def test_without_shares_each_operator_gets_its_part_of_the_mean_time():
    meter = meter_of(budgets=None, slo_ttft_s=1.0)
    paths = [path_of(queue=0.2, prefill=0.4), path_of(queue=0.4, prefill=0.6)]
    budgets = {one.operator: one for one in budget_report(meter, paths)}
    assert budgets["sort"].share == pytest.approx(0.3 / 0.9)
    assert budgets["prefill"].share == pytest.approx(0.5 / 0.9)
    assert sum(one.share for one in budgets.values()) == pytest.approx(1.0)
    assert budgets["sort"].misses == 1  # the second spent 0.4 of 0.333 s
    assert budgets["transfer"].misses == 0
    assert budgets["transfer"].slack_ms == pytest.approx(1000 - (700 + 1100) / 2)
    assert budgets["transfer"].least_slack_ms == pytest.approx(1000 - 1100)


def test_a_share_counts_where_a_request_did_not_wait():
    meter = meter_of()
    meter.learn(path_of())
    first = meter.divide(path_of(queue=0.0))[0]
    assert (first.operator, first.spent_s, first.slack_s) == ("sort", 0.0, 1.0)


def test_requests_without_an_objective_or_a_first_token_have_no_budget():
    assert meter_of(budgets=None).divide(path_of()) == []
    refused = RequestPath("r", 0, 0.0, 1.0, end="refused", ended_s=2.0)
    assert meter_of().divide(refused) == []


@pytest.mark.parametrize("text", [JOINT, PD])
def test_the_time_of_operators_is_the_ttft_and_the_tpot(text):
    paths = []
    simulation = Simulation(text)
    simulation.executor.recorders.append(PathTracker(paths.append).observe)
    simulation.run(random_workload(60, 12.0))
    meter = BudgetMeter(
        simulation.executor.plan.graph, RESOLVER.vocabulary, slo_ttft_s=1.0, slo_tpot_s=0.02
    )
    budget_report(meter, paths)
    assert len(paths) == 60
    for path in paths:
        found = meter.divide(path)
        ttft_s = sum(one.spent_s for one in found if one.budget == "ttft")
        assert ttft_s == pytest.approx(path.ttft_s, abs=1e-9)
        later = [one for one in found if one.budget == "tpot"]
        if path.num_tokens > 1:
            tpot_s = (path.ended_s - path.first_s) / (path.num_tokens - 1)
            assert sum(one.spent_s for one in later) == pytest.approx(tpot_s, abs=1e-9)
            assert later[-1].slack_s == pytest.approx(0.02 - tpot_s, abs=1e-9)


def test_observing_a_run_gives_the_paths_of_its_log():
    seen = []
    simulation = Simulation(PD)
    simulation.executor.recorders.append(PathTracker(seen.append).observe)
    outcome = simulation.run(random_workload(60, 12.0))
    assert seen == logged_paths(outcome, PD)


async def test_a_running_graph_meters_its_budgets(autojump_clock):
    graph = Graph("g").engine("g", model="null", device="null", decode_step_s=0.01)
    graph = graph >> ops.policy_sort() >> ops.generate(engine="g")
    async with graph.open(set={"budgets.slo_ttft_s": 1.0, "budgets.slo_tpot_s": 0.001}) as session:
        meter = watch(session.executor, RESOLVER.vocabulary)
        await session.generate([1] * 20, sampling=Sampling(max_tokens=5, ignore_eos=True))
        await trio.sleep(1)
    found = {(one.budget, one.operator): one for one in meter.report()}
    assert found["ttft", "generate"].misses == 0
    assert found["tpot", "generate"].misses == 1
    assert found["tpot", "generate"].latest_slack_ms == pytest.approx(1.0 - 10.0)


async def test_a_graph_without_budgets_is_not_observed(autojump_clock):
    graph = Graph("g").engine("g", model="null", device="null")
    async with (graph >> ops.generate(engine="g")).open() as session:
        assert watch(session.executor, RESOLVER.vocabulary) is None
        assert session.executor.recorders == []


def simulated(tmp_path, *more):
    file = tmp_path / "g.yaml"
    file.write_text(JOINT.replace("model: null", 'model: "null"'))
    trace = "synthetic:rate=8,requests=60,input=300,output=20,priorities=critical:1+background:3"
    return [
        "simulate", str(file), "--trace", trace, "--set", "budgets.slo_ttft_s=0.5",
        "--set", "budgets.ttft_shares.sort=0.25", *more,
    ]  # fmt: skip


def test_a_simulation_shows_budgets_and_classes(tmp_path, capsys):
    assert main(simulated(tmp_path, "--json")) == 0
    found = json.loads(capsys.readouterr().out)
    shares = {one["operator"]: one["share"] for one in found["budgets"]}
    assert shares == {"sort": 0.25, "generate": 0.75}
    assert {one["requests"] for one in found["budgets"]} == {60}
    assert set(found["ttft_ms_by_class"]) == {"critical", "background"}
    assert found["preempted"] == {}
    assert main(simulated(tmp_path)) == 0
    shown = capsys.readouterr().out
    assert "slack ms" in shown
    assert "TTFT background" in shown


def test_trace_shows_the_budgets_of_its_graph(tmp_path, capsys):
    log = tmp_path / "decisions.log"
    assert main(simulated(tmp_path, "--decisions", str(log))) == 0
    capsys.readouterr()
    assert main(["trace", str(log)]) == 0
    assert "of 60" in capsys.readouterr().out
    assert main(["trace", str(log), "3"]) == 0
    assert "25.0%" in capsys.readouterr().out
    assert main(["trace", str(log), "3", "--json"]) == 0
    (one,) = capsys.readouterr().out.splitlines()
    assert [each["operator"] for each in json.loads(one)["budgets"]] == ["sort", "generate"]
