"""Notes of operators become effects, and the outcomes of the requests are counted."""

from collections import Counter

from msgspec.structs import replace
from simulated_graphs import Simulation, random_workload, request_of

from sagellm.operators.ab_split import ABSplitOptions, arm_of
from sagellm.runtime.core.effects import Noted

TWO_ORDERS = """
sagellm: 1
name: orders
engines:
  g: {kind: modelled, model: null}
operators:
  ab:       {op: ab_split, share: 0.4}
  sort_a:   {op: policy_sort, policy: fifo}
  sort_b:   {op: policy_sort, policy: cost_optimized}
  route:    {op: route, strategy: load_balanced}
  generate: {op: generate, engine: g}
edges:
  - source -> ab
  - ab.a -> sort_a -> route -> generate -> sink
  - ab.b -> sort_b -> route
"""
NUMBER = 200


def run(text=TWO_ORDERS, slo_ttft_s=2.0):
    simulation = Simulation(text)
    for number, planned in enumerate(random_workload(NUMBER, 40.0)):
        request = request_of(number, planned)
        request = replace(request, user_id=f"u{number % 23}", slo_ttft_s=slo_ttft_s)
        simulation.timeline.at(
            planned.at_s, lambda request=request: simulation.executor.arrive(request)
        )
    simulation.timeline.run()
    return simulation


def test_each_request_is_noted_once_in_the_arm_of_its_user():
    events = run().outcome.events
    notes = [one.note for _, _, effects in events for one in effects if type(one) is Noted]
    assert len({one.key for one in notes}) == len(notes) == NUMBER
    for note in notes:
        user = f"user_id:u{int(note.request_id[1:]) % 23}"
        assert (note.unit, note.label) == (user, arm_of(user, ABSplitOptions(share=0.4)))


def test_the_outcomes_of_each_arm_are_those_of_its_requests():
    simulation = run()
    arrived = {f"r{n}": one.at_s for n, one in enumerate(random_workload(NUMBER, 40.0))}
    expected = {"a": Counter(), "b": Counter()}
    for name, seen in simulation.outcome.seen.items():
        user = f"user_id:u{int(name[1:]) % 23}"
        is_met = seen.first_s - arrived[name] <= 2.0
        expected[arm_of(user, ABSplitOptions(share=0.4))]["met" if is_met else "missed"] += 1
    tallies = simulation.executor.core.experiments.tallies
    assert {arm: tallies["ab", arm].outcomes for arm in "ab"} == expected
    for arm in "ab":
        tally = tallies["ab", arm]
        assert tally.kind == "arm"
        assert tally.ended == {"length": tally.num_notes}
        assert tally.ttft_s.num_samples == tally.e2e_s.num_samples == tally.num_notes


def test_without_experiments_the_core_keeps_none():
    plain = TWO_ORDERS.replace("ab_split, share: 0.4", "pd_split").replace("ab.a", "ab.aggregated")
    simulation = run(plain.replace("ab.b", "ab.disaggregated"))
    assert simulation.executor.core.experiments is None


def test_nothing_is_kept_of_requests_that_have_ended():
    experiments = run().executor.core.experiments
    assert experiments._watched == {}
    cells = experiments._cells
    assert all(cell.state.noted == () for cell in cells.values())


def test_a_refused_request_counts_as_unserved():
    text = TWO_ORDERS.replace(
        "  sort_b:", "  admission: {op: admission, max_queued: 1}\n  sort_b:"
    ).replace("ab.b -> sort_b", "ab.b -> admission -> sort_b")
    simulation = run(text, slo_ttft_s=None)
    tally = simulation.executor.core.experiments.tallies["ab", "b"]
    assert tally.ended["refused"] == tally.outcomes["unserved"] > 0
    assert tally.outcomes["served"] == tally.ended["length"]
