"""A waiting critical request takes the place of background work, in simulated time."""

from collections import Counter
from dataclasses import replace
from statistics import median

import pytest
from simulated_graphs import (
    JOINT,
    OPTIONS,
    PD,
    Planned,
    Simulation,
    background_workload,
    preempting,
)

from sagellm.runtime.core.core import Core
from sagellm.runtime.core.decision_log import encode_effects
from sagellm.runtime.core.effects import Preempt
from sagellm.runtime.core.events import Preempted
from sagellm.runtime.core.preemption import MAX_PREEMPTIONS
from sagellm.runtime.messages import PRIORITIES

CRITICAL, BACKGROUND = PRIORITIES["critical"], PRIORITIES["background"]
ENGINE = replace(OPTIONS, max_num_seqs=8)
# A place in decode is a slot of its engine.
SLOTS = "{op: decode, engine: d, max_inflight: 8}"
GRAPHS = {"joint": JOINT, "pd": PD.replace("{op: decode, engine: d}", SLOTS)}


def played(text, load, options=ENGINE):
    simulation = Simulation(text, options)
    return simulation, simulation.run(load)


def ttfts(outcome, load):
    """The TTFTs of critical requests, in order."""
    return sorted(
        outcome.seen[f"r{number}"].first_s - planned.at_s
        for number, planned in enumerate(load)
        if planned.priority == CRITICAL
    )


@pytest.mark.parametrize("graph", GRAPHS)
def test_critical_requests_do_not_wait_for_background_work(graph):
    load = background_workload(60.0)
    text = preempting(GRAPHS[graph]).replace("preempts: {critical: low}", "preempts: {}")
    without = ttfts(played(text, load)[1], load)
    simulation, outcome = played(preempting(GRAPHS[graph]), load)
    found = ttfts(outcome, load)
    assert median(found) < median(without) / 2
    assert found[-1] < without[-1]
    assert simulation.executor.core.preemption.num_preempted[BACKGROUND] > 20


@pytest.mark.parametrize("graph", GRAPHS)
def test_no_token_of_a_victim_is_lost_or_doubled(graph):
    """`Simulation.run` checks the ledger, which counts positions, and that no block is leased."""
    load = background_workload(20.0)
    _, outcome = played(preempting(GRAPHS[graph]), load)
    for number, planned in enumerate(load):
        seen = outcome.seen[f"r{number}"]
        assert (seen.num_tokens, seen.end) == (planned.num_output, "length")
    victims = [event.request for _, event, _ in outcome.events if isinstance(event, Preempted)]
    assert max(Counter(one.request_id for one in victims).values()) <= MAX_PREEMPTIONS
    # A modelled engine reports the tokens of many steps with the end: they count as emitted.
    assert max(one.num_emitted for one in victims) > 20


@pytest.mark.parametrize("graph", GRAPHS)
def test_a_fresh_core_preempts_as_the_log_says(graph):
    load = background_workload(20.0)
    _, outcome = played(preempting(GRAPHS[graph]), load)
    core = Core(Simulation(preempting(GRAPHS[graph]), ENGINE).executor.plan)
    num_preempted = 0
    for now, event, effects in outcome.events:
        assert encode_effects(core.on(event, now)) == encode_effects(effects)
        num_preempted += sum(isinstance(one, Preempt) for one in effects)
    assert num_preempted > 5


def test_prompts_that_are_being_computed_are_preempted_too():
    """Eight prompts of 10 s each fill the prefill engines; their blocks in the decode pool come
    back too.
    """
    options = replace(ENGINE, prefill_token_s=2e-3, max_num_seqs=64)
    long = [Planned(0.01 * number, 5000, 4, priority=BACKGROUND) for number in range(16)]
    load = [*long, Planned(1.0, 100, 4, priority=CRITICAL)]
    text = preempting(PD)
    _, outcome = played(text, load, options)
    preempted = [event for _, event, _ in outcome.events if isinstance(event, Preempted)]
    assert [event.node for event in preempted] == ["prefill"]
    assert outcome.seen["r16"].first_s < 20.0


def test_requests_that_end_leave_nothing_in_the_core():
    simulation, _ = played(preempting(JOINT), background_workload(20.0))
    preemption = simulation.executor.core.preemption
    assert not any((preemption._claims, preemption._claimants, preemption._times))
    assert not len(preemption._running)
