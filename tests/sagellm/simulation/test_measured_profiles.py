"""Simulations with a measured profile: the time of the host, and the spread of steps."""

import json
from dataclasses import replace

import pytest
from simulated_graphs import JOINT, OPTIONS, PD, Planned, Simulation, random_workload

from sagellm.runtime.engine.costs.spread import SHARES
from sagellm.runtime.operator import Signal

STEP_S, TOKEN_S = 0.01, 0.0001
HOST = {"submit_s": 0.003, "submit_token_s": 1e-5, "deliver_s": 0.002, "deliver_row_s": 0.001}
FORM = {
    "form": "fitted",
    "step_s": STEP_S,
    "tokens": [0, 1],
    "token_seconds": [0, TOKEN_S],
    "prefill_pair_s": 0.0,
    "contexts": [0],
    "context_seconds": [0],
    "row_s": 0.0,
}
SPREAD = [{"from_s": 0.0, "ratios": [0.8 + 0.05 * index for index in range(len(SHARES))]}]


@pytest.fixture
def options(tmp_path):
    """Options with a profile that has these fields."""

    def made(**more):
        profile = {"name": "m", "model": None, "device": "cpu", "method": "measured"}
        file = tmp_path / "m.json"
        file.write_text(json.dumps({**profile, "made_on": "2026-11-25", "cost": FORM, **more}))
        costs = {"prefill_token_s": 1e-4, "decode_step_s": 0.01}  # those that a profile excludes
        plain = dict.fromkeys(("decode_row_s", "context_token_s"), 0.0)
        return replace(OPTIONS, profile=str(file), **costs, **plain)

    return made


def test_a_request_takes_the_time_of_the_host_too(options):
    """100 tokens: 4 ms to submit, 20 ms to compute, 3 ms to deliver."""
    outcome = Simulation(JOINT, options(host=HOST), replicas=1).run([Planned(0.0, 100, 3)])
    seen = outcome.seen["r0"]
    assert seen.first_s == pytest.approx(0.004 + STEP_S + 100 * TOKEN_S + 0.003)
    assert seen.last_s == pytest.approx(seen.first_s + 2 * (STEP_S + TOKEN_S))


def test_the_host_submits_one_after_another(options):
    """The second is submitted 4 ms later, and joins the step after the first."""
    simulation = Simulation(JOINT, options(host=HOST), replicas=1)
    seen = simulation.run([Planned(0.0, 100, 1), Planned(0.0, 100, 1)]).seen
    assert seen["r0"].first_s == pytest.approx(0.027)
    assert seen["r1"].first_s == pytest.approx(0.047)


def test_without_a_host_nothing_is_added(options):
    seen = Simulation(JOINT, options(), replicas=1).run([Planned(0.0, 100, 3)]).seen["r0"]
    assert seen.first_s == pytest.approx(STEP_S + 100 * TOKEN_S)


@pytest.mark.parametrize("graph", [JOINT, PD])
@pytest.mark.parametrize("at_s", [0.001, 0.0039, 0.0045, 0.026, 0.028, 0.05])
def test_a_request_may_be_cancelled_while_the_host_is_at_it(options, graph, at_s):
    """`run` checks that all blocks are free, and that each request ended once."""
    simulation = Simulation(graph, options(host=HOST), replicas=1)
    cancel = Signal("cancel", "r0")
    simulation.timeline.at(at_s, lambda: simulation.executor.signal(cancel))
    outcome = simulation.run([Planned(0.0, 100, 30), Planned(0.0, 100, 3)])
    assert outcome.seen["r0"].end == "cancelled"
    assert outcome.seen["r1"].end == "length"


@pytest.mark.parametrize("at_s", [0.002, 0.0245, 0.0255, 0.04])
def test_an_engine_may_die_while_events_are_on_their_way(options, at_s):
    simulation = Simulation(JOINT, options(host=HOST), replicas=2)
    replica = simulation.engines["g"][0]
    simulation.timeline.at(at_s, lambda: simulation.executor.fail(replica, for_s=0.01))
    outcome = simulation.run([Planned(0.0, 100, 1), Planned(0.0, 100, 5), Planned(0.001, 9, 9)])
    assert {seen.end for seen in outcome.seen.values()} == {"length"}
    assert [seen.num_tokens for seen in outcome.seen.values()].count(0) == 0


@pytest.mark.parametrize("graph", [JOINT, PD])
def test_random_requests_all_end(options, graph):
    simulation = Simulation(graph, options(host=HOST, spread=SPREAD))
    outcome = simulation.run(random_workload(150, 20))
    assert {seen.end for seen in outcome.seen.values()} == {"length"}
