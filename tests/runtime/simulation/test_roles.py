"""Roles of replicas in simulated time: they follow a load that flips, and lose no token."""

from dataclasses import replace

from simulated_graphs import OPTIONS, Planned, Simulation, random_workload

from sagellm.runtime.core.effects import Assigned

GRAPH = """
sagellm: 1
name: roles
engines:
  g: {kind: modelled, model: null}
operators:
  sort:     {op: policy_sort, policy: fifo}
  roles:    {op: roles, interval_s: 2, prefill_replicas: 2}
  route:    {op: route, pools: operator}
  prefill:  {op: prefill, engine: g}
  transfer: {op: kv_transfer, max_inflight: 64}
  decode:   {op: decode, engine: g}
edges:
  - source -> roles -> sort -> route -> prefill -> transfer -> decode -> sink
"""
FEW = replace(OPTIONS, max_num_seqs=16, prefill_token_s=1e-3)


def assignments(outcome):
    """(time, operator, replica) of each gate that was opened to a role."""
    return [
        (now, effect.node, effect.replica)
        for now, _, effects in outcome.events
        for effect in effects
        if isinstance(effect, Assigned) and effect.is_on
    ]


def flipped():
    """A minute of long prompts and short answers, then a minute of the opposite."""
    prompts = [Planned(0.4 * number, 1000, 4) for number in range(150)]
    answers = [Planned(60 + 0.12 * number, 20, 300) for number in range(500)]
    return prompts + answers


def test_roles_follow_a_load_that_flips_and_do_not_swing():
    simulation = Simulation(GRAPH, FEW, replicas=4)
    outcome = simulation.run(flipped())  # checks the ledger, and that no block is leased
    found = assignments(outcome)
    assert all(seen.end == "length" for seen in outcome.seen.values())
    late = [(node, now) for now, node, _ in found if now > 60]
    assert {node for node, _ in late} == {"decode"}
    assert 1 <= len(late) <= 2
    assert min(now for _, now in late) < 80


def test_a_lost_replica_costs_no_token_and_no_role():
    simulation = Simulation(GRAPH, FEW, replicas=4)
    for at_s, number in ((20.0, 3), (70.0, 0), (75.0, 2)):
        engine = simulation.engines["g"][number]
        simulation.timeline.at(at_s, lambda engine=engine: simulation.executor.fail(engine, 3.0))
    planned = flipped()
    outcome = simulation.run(planned)
    for number, request in enumerate(planned):
        seen = outcome.seen[f"r{number}"]
        assert (seen.end, seen.num_tokens) == ("length", request.num_output)


def test_random_loads_end_with_all_their_tokens():
    for seed in range(3):
        simulation = Simulation(GRAPH, FEW, replicas=3)
        planned = random_workload(200, 5.0, seed=seed, prompt=300, output=60)
        outcome = simulation.run(planned)
        tokens = [outcome.seen[f"r{number}"].num_tokens for number in range(len(planned))]
        assert tokens == [one.num_output for one in planned]
