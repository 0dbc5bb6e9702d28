"""A simulation runs the graph itself: with the times, placements and ends of a real executor."""

from dataclasses import replace
from statistics import median

import pytest
from simulated_graphs import JOINT, OPTIONS, PD, Planned, Simulation, live, random_workload

from sagellm.runtime.core.core import Core
from sagellm.runtime.core.decision_log import encode_effects
from sagellm.runtime.core.effects import Send
from sagellm.runtime.operator import Signal
from sagellm.runtime.simulation.timeline import SimulationError

WORKLOAD = random_workload(150, 8.0)


def placements(outcome):
    """The replicas to which each request was sent, in order."""
    placed = {}
    for _, _, effects in outcome.events:
        for effect in effects:
            if isinstance(effect, Send):
                where = placed.setdefault(effect.item.request_id, [])
                where.append((effect.node, effect.replica))
    return placed


def test_times_of_one_engine_a_request_are_those_of_the_real_executor():
    simulated, real = Simulation(JOINT).run(WORKLOAD), live(JOINT, WORKLOAD)
    assert placements(simulated) == placements(real)
    for request_id, seen in real.seen.items():
        found = simulated.seen[request_id]
        assert (found.num_tokens, found.end) == (seen.num_tokens, seen.end)
        assert found.first_s == pytest.approx(seen.first_s, abs=1e-9)
        assert found.last_s == pytest.approx(seen.last_s, abs=1e-9)


def test_times_of_prefill_and_decode_engines_are_close_to_those_of_the_real_executor():
    simulated, real = Simulation(PD).run(WORKLOAD), live(PD, WORKLOAD)
    step_s = OPTIONS.decode_step_s
    late = [abs(simulated.seen[one].first_s - seen.first_s) for one, seen in real.seen.items()]
    assert median(late) < 1e-9
    assert max(late) < 2 * step_s
    ends = [abs(simulated.seen[one].last_s - seen.last_s) for one, seen in real.seen.items()]
    assert median(ends) < 1e-9


def test_sequences_that_wait_for_blocks_start_when_those_of_the_real_executor_do():
    options = replace(OPTIONS, num_blocks=700, max_model_len=8000, kv_bytes_per_s=1e13)
    simulated, real = Simulation(PD, options).run(WORKLOAD), live(PD, WORKLOAD, options)
    late = [abs(simulated.seen[one].first_s - seen.first_s) for one, seen in real.seen.items()]
    assert median(late) < 1e-9
    assert max(late) < OPTIONS.decode_step_s


@pytest.mark.parametrize("text", [JOINT, PD])
def test_equal_inputs_give_equal_decisions(text):
    one, other = Simulation(text).run(WORKLOAD), Simulation(text).run(WORKLOAD)
    assert one.seen == other.seen
    assert [(now, encode_effects(effects)) for now, _, effects in one.events] == [
        (now, encode_effects(effects)) for now, _, effects in other.events
    ]


def test_a_fresh_core_decides_the_log_of_a_simulation_again():
    simulation = Simulation(PD)
    outcome = simulation.run(WORKLOAD)
    core = Core(Simulation(PD).executor.plan)
    for now, event, effects in outcome.events:
        assert encode_effects(core.on(event, now)) == encode_effects(effects)


def test_a_full_decode_pool_lets_prefills_wait_and_leaks_no_block():
    options = replace(OPTIONS, num_blocks=80, max_model_len=1200)
    workload = [Planned(0.001 * number, 400, 40) for number in range(60)]
    outcome = Simulation(PD, options, replicas=1).run(workload)
    assert {seen.end for seen in outcome.seen.values()} == {"length"}


def test_prompts_with_equal_blocks_are_computed_once():
    options = replace(OPTIONS, prefix_caching=True, block_size=64, num_blocks=512)
    shared = tuple(range(8))
    workload = [Planned(float(number), 512 * 8 + 100, 4, shared) for number in range(3)]
    simulation = Simulation(JOINT, options, replicas=1, block_len=512)
    outcome = simulation.run(workload)
    first, second, _ = (
        seen.first_s - planned.at_s
        for seen, planned in zip(outcome.seen.values(), workload, strict=True)
    )
    assert first > 10 * second
    load = simulation.engines["g"][0].load
    assert load.num_prefix_hits == 2 * 512 * 8


def test_a_router_that_reads_caches_finds_the_replica_of_a_prefix():
    options = replace(OPTIONS, prefix_caching=True, block_size=64, num_blocks=1024)
    text = JOINT.replace("load_balanced", "prefix_aware")
    workload = [
        Planned(
            float(number), 512 * 4 + 10, 4, tuple(range(10 * (number % 4), 10 * (number % 4) + 4))
        )
        for number in range(40)
    ]
    outcome = Simulation(text, options, replicas=4, block_len=512).run(workload)
    where = [placed for ((_, placed),) in placements(outcome).values()]
    for family in range(4):
        assert len(set(where[family::4])) == 1


def test_blocks_of_an_engine_must_divide_those_of_the_trace():
    with pytest.raises(SimulationError, match="block_size: 48 does not divide the 512 tokens"):
        Simulation(JOINT, replace(OPTIONS, block_size=48), block_len=512)


@pytest.mark.parametrize(("text", "engine"), [(JOINT, "g"), (PD, "p"), (PD, "d")])
def test_a_replica_that_dies_loses_no_request(text, engine):
    simulation, busy = Simulation(text), random_workload(150, 20.0)
    replica = simulation.engines[engine][1]
    simulation.timeline.at(4.0, lambda: simulation.executor.fail(replica, for_s=3.0))
    outcome = simulation.run(busy)
    assert {seen.end for seen in outcome.seen.values()} == {"length"}
    for number, planned in enumerate(busy):
        assert outcome.seen[f"r{number}"].num_tokens == planned.num_output
    moved = {
        effect.item.request_id
        for now, _, effects in outcome.events
        for effect in effects
        if isinstance(effect, Send) and getattr(effect.item, "epoch", 0)
    }
    assert moved
    while_down = [
        effect
        for now, _, effects in outcome.events
        for effect in effects
        if isinstance(effect, Send) and 4.0 < now < 7.0 and effect.node in simulation.nodes(engine)
    ]
    assert while_down
    assert {effect.replica for effect in while_down} == {0}


def test_a_sender_that_dies_in_a_transfer_loses_no_request():
    simulation = Simulation(PD, replace(OPTIONS, kv_bytes_per_s=1e5))
    sender = simulation.engines["p"][0]
    simulation.timeline.at(0.5, lambda: simulation.executor.fail(sender, for_s=2.0))
    outcome = simulation.run([Planned(0.0, 500, 5), Planned(0.1, 500, 5)])
    assert {seen.end for seen in outcome.seen.values()} == {"length"}
    again = {
        effect.item.request_id
        for _, _, effects in outcome.events
        for effect in effects
        if isinstance(effect, Send) and getattr(effect.item, "epoch", 0)
    }
    assert again


def test_a_receiver_that_dies_while_prefills_wait_for_it_loses_no_request():
    simulation = Simulation(PD, replace(OPTIONS, num_blocks=80, max_model_len=1200))
    receiver = simulation.engines["d"][0]
    simulation.timeline.at(0.4, lambda: simulation.executor.fail(receiver, for_s=1.0))
    outcome = simulation.run([Planned(0.001 * number, 400, 40) for number in range(40)])
    assert {seen.end for seen in outcome.seen.values()} == {"length"}


@pytest.mark.parametrize("text", [JOINT, PD])
@pytest.mark.parametrize("at_s", [0.001, 0.05, 0.2, 0.3, 0.6, 1.0])
def test_a_cancel_ends_a_request_wherever_it_is(text, at_s):
    simulation = Simulation(text, replicas=1)
    cancel = Signal("cancel", "r0")
    simulation.timeline.at(at_s, lambda: simulation.executor.signal(cancel))
    outcome = simulation.run([Planned(0.0, 1500, 100), Planned(0.0, 1500, 100)])
    assert outcome.seen["r0"].end == "cancelled"
    assert outcome.seen["r0"].last_s < at_s + 0.1
    assert outcome.seen["r1"].end == "length"


def test_engines_die_again_and_again():
    simulation = Simulation(JOINT)
    for number, at_s in enumerate((0.3, 0.6, 1.2, 1.8)):
        replica = simulation.engines["g"][number % 2]
        simulation.timeline.at(at_s, lambda one=replica: simulation.executor.fail(one, for_s=0.1))
    outcome = simulation.run([Planned(0.01 * number, 900, 200) for number in range(20)])
    assert {seen.end for seen in outcome.seen.values()} <= {"length", "failed"}
