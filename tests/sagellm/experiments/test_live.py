"""Shadows and arms of graphs that run: in one process, over worker processes, and in /metrics."""

from typing import Any

import pytest
from gateway_calls import CARD
from prometheus_client.parser import text_string_to_metric_families as parse

from sagellm import Graph, Sampling, ops
from sagellm.experiments.arms import read_arms
from sagellm.experiments.disagreements import shadow_report
from sagellm.gateway.metrics.exposition import GatewayMeters
from sagellm.opening.decisions import replay

FIVE = Sampling(max_tokens=5, ignore_eos=True)
NULL = {"model": "null", "device": "null"}
SHADOWS = {
    "admission.shadow": {"max_queued": 1},
    "sort.shadow": {"policy": "fifo"},
    "split.shadow": {"min_uncached_tokens": 64},
    "route.shadow": {"strategy": "round_robin"},
}


@pytest.mark.parametrize("executor", ["tasks", "processes"])
async def test_the_shadows_of_a_running_graph_are_in_its_log(executor: str, tmp_path: Any) -> None:
    log = tmp_path / "log"
    null = {f"{name}.{key}": value for name in "pd" for key, value in NULL.items()}
    opened = Graph.load("pd_many").open(set={**null, **SHADOWS}, executor=executor, decisions=log)
    async with opened as session:
        for number in range(4):
            answer = await session.generate([number + 1] * 40, sampling=FIVE)
            assert answer.finish_reason == "length"
        live = session.executor.core.experiments
        assert live is not None
        decisions = {node: live.num_decisions(node) for node in live.shadows}
        outcomes = live.tallies["split", "elsewhere"].outcomes
    assert decisions == {"admission": 4, "sort": 4, "split": 4, "route": 4}
    assert outcomes == {"served": 4}
    assert replay(log, functions={}).difference is None
    report = shadow_report(log, {})
    assert {one.node: one.num_decisions for one in report.nodes} == decisions
    split = [one.note for one in report.differences if one.node == "split"]
    assert {(note.live, note.shadow) for note in split} == {("disaggregated", "aggregated")}


def two_arms() -> Graph:
    graph = Graph("arms").engine("one", **NULL).engine("two", **NULL)
    split = ops.ab_split(share=0.5)
    graph >> split
    first = ops.policy_sort("fifo", shadow={"policy": "priority"})
    split.outlet("a") >> first >> ops.generate(engine="one")
    split.outlet("b") >> ops.generate(engine="two")
    return graph


async def test_arms_and_shadows_are_metrics(tmp_path: Any) -> None:
    log = tmp_path / "log"
    async with two_arms().open(decisions=log) as session:
        meters = GatewayMeters(session, models=(CARD,), endpoints=())
        for number in range(12):
            await session.generate([1, 2, 3], sampling=FIVE, user_id=f"user {number}")
        body, _ = await meters.exposition()
    samples = [one for family in parse(body.decode()) for one in family.samples]

    def value(name: str, **labels: str) -> float:
        found = [
            one for one in samples if one.name == name and labels.items() <= one.labels.items()
        ]
        return sum(one.value for one in found)

    arms = {arm: value("sagellm_arm_requests_total", arm=arm) for arm in "ab"}
    assert min(arms.values()) > 0
    assert sum(arms.values()) == 12
    for arm, number in arms.items():
        assert value("sagellm_arm_outcomes_total", arm=arm, outcome="served") == number
        assert value("sagellm_arm_ended_total", arm=arm, finish_reason="length") == number
        assert value("sagellm_arm_time_to_first_token_seconds_count", arm=arm) == number
        assert value("sagellm_arm_e2e_seconds_count", arm=arm) == number
    assert value("sagellm_shadow_decisions_total", kind="order") == arms["a"]
    assert value("sagellm_shadow_off", kind="order") == 0
    assert sum(one.arm == "a" for one in read_arms(log)) == arms["a"]


async def test_a_graph_without_experiments_has_no_metrics_of_them() -> None:
    graph = Graph("plain").engine("g", **NULL)
    graph >> ops.policy_sort("fifo") >> ops.generate(engine="g")
    async with graph.open() as session:
        meters = GatewayMeters(session, models=(CARD,), endpoints=())
        body, _ = await meters.exposition()
    assert b"sagellm_shadow" not in body
    assert b"sagellm_arm" not in body
