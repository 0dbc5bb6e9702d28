"""A waiting critical request takes the place of background work, in simulated time."""

from collections import Counter
from dataclasses import replace
from random import Random
from statistics import median

import pytest
from msgspec.structs import replace as with_fields
from simulated_graphs import JOINT, OPTIONS, PD, Planned, Simulation, request_of

from sagellm.runtime.core.core import Core
from sagellm.runtime.core.decision_log import encode_effects
from sagellm.runtime.core.effects import Preempt
from sagellm.runtime.core.events import Preempted
from sagellm.runtime.core.preemption import MAX_PREEMPTIONS
from sagellm.runtime.messages import PRIORITIES

CRITICAL, BACKGROUND = PRIORITIES["critical"], PRIORITIES["background"]
ENGINE = replace(OPTIONS, max_num_seqs=8)
SORT = "{op: policy_sort, policy: priority"
GRAPHS = {"joint": JOINT, "pd": PD}


def preempting(text, preempts="{critical: low}"):
    return text.replace("{op: policy_sort, policy: fifo", f"{SORT}, preempts: {preempts}")


def workload(seconds=60.0, *, load=1.5, seed=3):
    """Background work at `load` times what two engines of 8 places serve, and a critical request
    every second.
    """
    draw, at_s, planned = Random(seed), 0.0, []
    while at_s < seconds:  # an answer of 200 tokens takes about 2.2 s of one of 16 places
        at_s += draw.expovariate(load * 16 / 2.2)
        planned.append((Planned(at_s, 200, 150 + draw.randrange(100)), BACKGROUND))
    critical = [(Planned(0.5 + number, 200, 20), CRITICAL) for number in range(int(seconds))]
    return sorted(planned + critical, key=lambda one: one[0].at_s)


class Prioritised(Simulation):
    def run(self, load):
        self.priorities = [priority for _, priority in load]
        return super().run([planned for planned, _ in load])

    def at(self, planned, number):
        request = with_fields(request_of(number, planned), priority=self.priorities[number])
        self.timeline.at(planned.at_s, lambda: self.executor.arrive(request))


def played(text, load, options=ENGINE):
    simulation = Prioritised(text, options)
    outcome = simulation.run(load)
    return simulation, outcome


def ttfts(outcome, load):
    """The TTFTs of critical requests, in order."""
    return sorted(
        outcome.seen[f"r{number}"].first_s - planned.at_s
        for number, (planned, priority) in enumerate(load)
        if priority == CRITICAL
    )


@pytest.mark.parametrize("graph", GRAPHS)
def test_critical_requests_do_not_wait_for_background_work(graph):
    load = workload()
    text = GRAPHS[graph].replace("{op: policy_sort, policy: fifo", SORT)
    without = ttfts(played(text, load)[1], load)
    simulation, outcome = played(preempting(GRAPHS[graph]), load)
    found = ttfts(outcome, load)
    print(graph, "without", median(without), without[-1], "with", median(found), found[-1])
    assert median(found) < median(without) / 2
    assert found[-1] < without[-1]
    assert simulation.executor.core.preemption.num_preempted[BACKGROUND] > 20


@pytest.mark.parametrize("graph", GRAPHS)
def test_no_token_of_a_victim_is_lost_or_doubled(graph):
    """`Simulation.run` checks the ledger, which counts positions, and that no block is leased."""
    load = workload(20.0)
    _, outcome = played(preempting(GRAPHS[graph]), load)
    for number, (planned, _) in enumerate(load):
        seen = outcome.seen[f"r{number}"]
        assert (seen.num_tokens, seen.end) == (planned.num_output, "length")
    times = Counter(
        event.request.request_id for _, event, _ in outcome.events if isinstance(event, Preempted)
    )
    assert times
    assert max(times.values()) <= MAX_PREEMPTIONS


@pytest.mark.parametrize("graph", GRAPHS)
def test_a_fresh_core_preempts_as_the_log_says(graph):
    load = workload(20.0)
    _, outcome = played(preempting(GRAPHS[graph]), load)
    core = Core(Prioritised(preempting(GRAPHS[graph]), ENGINE).executor.plan)
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
    long = [(Planned(0.01 * number, 5000, 4), BACKGROUND) for number in range(16)]
    load = [*long, (Planned(1.0, 100, 4), CRITICAL)]
    text = preempting(PD)
    simulation, outcome = played(text, load, options)
    preempted = [event for _, event, _ in outcome.events if isinstance(event, Preempted)]
    assert [event.node for event in preempted] == ["prefill"]
    assert outcome.seen["r16"].first_s < 20.0


def test_requests_that_end_leave_nothing_in_the_core():
    simulation, _ = played(preempting(JOINT), workload(20.0))
    preemption = simulation.executor.core.preemption
    assert not any(
        (preemption._claims, preemption._claimants, preemption._times)
    )
    assert not any(any(classes.values()) for classes in preemption._running.values())
