"""Shadows of operators: compared on every decision, and without any influence on the live one."""

from dataclasses import dataclass, field
from dataclasses import replace as replace_field
from functools import partial
from random import Random

import pytest
from msgspec.structs import replace
from simulated_graphs import (
    JOINT,
    OPTIONS,
    PD,
    Planned,
    Simulation,
    live,
    random_workload,
    request_of,
)

from sagellm.extensions import RESOLVER
from sagellm.graphs.check import Facts, check
from sagellm.graphs.diagnostics import GraphError
from sagellm.graphs.text.yaml import load
from sagellm.graphs.vocabulary import REQUEST, OpSpec, Port
from sagellm.runtime.core.core import Core
from sagellm.runtime.core.effects import Deliver, Faulted, Interrupt, Noted, Send
from sagellm.runtime.core.events import Arrived, TimeCame
from sagellm.runtime.messages import Request
from sagellm.runtime.operator import Arrival, Emit, Setup, Signal, Step, Wake
from sagellm.runtime.plan import plan
from sagellm.runtime.resolver import Resolver

RATE = 40.0  # requests a second: more than the two replicas of a graph serve


def decided(outcome):
    """Every decision about requests, with its time, without the notes of shadows."""
    found = []
    for now, _, effects in outcome.events:
        for one in effects:
            if isinstance(one, Send):
                found.append((now, one.node, one.replica, one.item.key))
            elif isinstance(one, Deliver):
                item = one.item
                found.append((now, item.key, item.num_tokens, item.finish_reason, item.code))
            elif isinstance(one, Interrupt):
                found.append((now, one))
    return found


def notes(outcome):
    return [one for _, _, effects in outcome.events for one in effects if type(one) is Noted]


def shadowed(text, option, shadow):
    assert text.count(option) == 1 or "strategy" in option
    return text.replace(option, f"{option}, shadow: {{{shadow}}}")


def run(text, workload=None, **options):
    simulation = Simulation(text, **options)
    simulation.run(random_workload(300, RATE) if workload is None else workload)
    return simulation


CASES = [
    (JOINT, "policy: fifo", "policy: cost_optimized", "sort"),
    (JOINT, "policy: fifo", "policy: weighted_shortest_prefill", "sort"),
    (JOINT, "policy: fifo", "policy: longest_prefix_match", "sort"),
    (JOINT, "strategy: load_balanced", "strategy: random", "route"),
    # The shadow gets feedback that the live strategy does not get.
    (JOINT, "strategy: random", "strategy: predicted_latency", "route"),
    (JOINT, "strategy: power_of_two", "strategy: prefix_aware", "route"),
    (JOINT, "max_queued: 100000", "max_queued: 20", "admission"),
    (JOINT, "max_queued: 20", "max_queued: 100000", "admission"),
    (PD, "min_uncached_tokens: 32", "min_uncached_tokens: 2000", "split"),
    (PD, "strategy: load_balanced", "strategy: predicted_latency", "route"),
]


SHARING = {"block_len": 512, "options": replace_field(OPTIONS, prefix_caching=True)}


def prompts_that_share(number):
    """A workload in which a third of the prompts begin like another."""
    return [
        Planned(one.at_s, max(one.num_prompt, 1100), one.num_output, (place % 7, 100 + place % 3))
        for place, one in enumerate(random_workload(number, RATE))
    ]


@pytest.mark.parametrize(("text", "option", "shadow", "node"), CASES)
def test_a_shadow_changes_no_decision(text, option, shadow, node):
    text = text.replace("load_balanced", option[10:]) if option.startswith("strategy") else text
    text = text.replace("max_queued: 100000", option) if option.startswith("max") else text
    alone = run(text, prompts_that_share(300), **SHARING)
    both = run(shadowed(text, option, shadow), prompts_that_share(300), **SHARING)
    assert decided(both.outcome) == decided(alone.outcome)
    experiments = both.executor.core.experiments
    assert experiments.fault(node) is None
    assert experiments.num_decisions(node) > 100
    assert notes(both.outcome)


@pytest.mark.parametrize(
    ("text", "option", "shadow"),
    [
        (JOINT, "policy: fifo", "window: 8"),
        (JOINT, "policy: aegaeon", "window: 8"),
        (JOINT, "strategy: random", "strategy: random"),
        (JOINT, "strategy: prefix_aware", "strategy: prefix_aware"),
        (JOINT, "strategy: predicted_latency", "strategy: predicted_latency"),
        (JOINT, "max_queued: 20", "max_queued: 20"),
        (PD, "min_uncached_tokens: 32", "min_uncached_tokens: 32"),
    ],
)
def test_an_equal_shadow_never_disagrees(text, option, shadow):
    for before, name in (("load_balanced", "strategy"), ("fifo", "policy"), ("100000", "max")):
        text = text.replace(before, option.split(": ")[1]) if option.startswith(name) else text
    found = run(shadowed(text, option, shadow), prompts_that_share(300), **SHARING)
    experiments = found.executor.core.experiments
    assert experiments.tallies == {}
    assert all(experiments.num_decisions(node) > 0 for node in experiments.shadows)


EVERYWHERE = (
    ("max_queued: 100000", "max_queued: 20"),
    ("policy: fifo", "policy: least_slack, late: refuse"),
    ("min_uncached_tokens: 32", "min_uncached_tokens: 2000"),
    ("strategy: load_balanced", "strategy: prefix_aware"),
)


def troubled(text, seed):
    """A run in which requests are cancelled, expire and are late, and replicas die."""
    simulation, source = Simulation(text, **SHARING), Random(seed)
    for number, planned in enumerate(prompts_that_share(300)):
        request = replace(
            request_of(number, planned),
            slo_ttft_s=source.choice((None, 0.5, 5.0)),
            expires_s=planned.at_s + 3.0 if source.random() < 0.2 else None,
            user_id=f"u{number % 5}",
        )
        arrive = partial(simulation.executor.arrive, request)
        simulation.timeline.at(planned.at_s, arrive)
        if source.random() < 0.2:
            cancel = partial(simulation.executor.signal, Signal("cancel", request.request_id))
            simulation.timeline.at(planned.at_s + source.random() * 4, cancel)
    for engines in simulation.engines.values():
        fail = partial(simulation.executor.fail, engines[seed % 2], 1.0)
        simulation.timeline.at(1.0 + source.random() * 4, fail)
    simulation.timeline.run()
    simulation.executor.core.ledger.check()
    return simulation


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("graph", [JOINT, PD])
def test_shadows_everywhere_change_nothing_in_times_of_trouble(graph, seed):
    text = graph
    for option, shadow in EVERYWHERE:
        text = text.replace(option, f"{option}, shadow: {{{shadow}}}")
    alone, shadows = troubled(graph, seed), troubled(text, seed)
    assert decided(shadows.outcome) == decided(alone.outcome)
    experiments = shadows.executor.core.experiments
    assert not any(experiments.fault(node) for node in experiments.shadows)
    assert experiments._watched == {}
    state = shadows.executor.core.logic_graph.cells["sort"].state
    assert len(state.live.entries) == len(state.shadow.entries) == len(state.missing) == 0


def test_admission_notes_what_the_shadow_would_refuse_and_what_became_of_it():
    text = shadowed(JOINT, "max_queued: 100000", "max_queued: 20")
    found = run(text)
    (tally,) = found.executor.core.experiments.tallies.values()
    assert (tally.node, tally.kind, tally.label) == ("admission", "admission", "would refuse")
    noted = notes(found.outcome)
    assert {(one.note.live, one.note.shadow) for one in noted} == {("accepted", "queue_full")}
    assert tally.num_notes == len(noted) == len({one.note.request_id for one in noted})
    assert tally.outcomes == {"served": len(noted)}  # no request has an objective
    assert tally.ttft_s.num_samples == tally.e2e_s.num_samples == len(noted)


def test_outcomes_are_judged_by_the_objective_that_admission_gives():
    text = JOINT.replace("100000", "100000, slo_ttft_s: 3.0, shadow: {max_queued: 20}")
    text = text.replace("max_queued: 100000", "max_queued: 4096")
    found = run(text)
    seen, noted = found.outcome.seen, notes(found.outcome)
    ids = {one.note.request_id for one in noted if one.note.shadow == "queue_full"}
    arrived = {f"r{n}": one.at_s for n, one in enumerate(random_workload(300, RATE))}
    served = {one for one in ids if seen[one].first_s is not None}
    met = sum(seen[one].first_s - arrived[one] <= 3.0 for one in served)
    tally = found.executor.core.experiments.tallies["admission", "would refuse"]
    assert served
    assert tally.outcomes.get("met", 0) == met
    assert tally.outcomes.get("missed", 0) == len(served) - met


def test_the_shadow_of_an_order_names_the_request_that_it_would_send():
    text = shadowed(JOINT, "policy: fifo", "policy: cost_optimized")
    plain = {f"r{n}": one for n, one in enumerate(random_workload(300, RATE))}
    noted = [one.note for one in notes(run(text).outcome)]
    assert noted
    for note in noted:  # the shortest prompt first
        assert plain[note.shadow].num_prompt <= plain[note.request_id].num_prompt
        assert (note.live, note.label) == ("sent", "other first")
        assert note.watched == (note.shadow, 0)


@pytest.mark.parametrize(("live_late", "shadow_late"), [("demote", "refuse"), ("refuse", "demote")])
def test_two_queues_of_which_one_refuses_late_requests_stay_in_step(live_late, shadow_late):
    options = f"policy: least_slack, late: {live_late}, shadow: {{late: {shadow_late}}}"
    text = JOINT.replace("policy: fifo", options)
    text = text.replace("  admission: {op: admission, max_queued: 100000}\n", "")
    simulation = Simulation(text.replace("source -> admission -> sort", "source -> sort"))
    for number, planned in enumerate(random_workload(300, RATE)):
        simulation.timeline.at(planned.at_s, late_arrival(simulation, number, planned))
    simulation.timeline.run()
    state = simulation.executor.core.logic_graph.cells["sort"].state
    assert state.fault is None
    assert len(state.live.entries) == len(state.shadow.entries) == len(state.missing) == 0
    refused = simulation.executor.core.experiments.tallies.get(("sort", "would refuse"))
    if shadow_late == "refuse":
        assert refused.num_notes > 20
        assert refused.outcomes["missed"] > 20
    else:
        assert refused is None
        assert simulation.executor.core.ledger.ended["refused"] > 20


def late_arrival(simulation, number, planned):

    request = replace(request_of(number, planned), slo_ttft_s=0.5)
    return lambda: simulation.executor.arrive(request)


def test_routes_are_compared_by_replica_and_by_predicted_time():
    text = JOINT.replace("load_balanced", "predicted_latency, shadow: {strategy: random}")
    found = run(text)
    (tally,) = found.executor.core.experiments.tallies.values()
    assert tally.num_predicted > 0
    assert tally.gain_s < 0  # chance loses against prediction, as predicted
    note = notes(found.outcome)[-1].note
    assert {note.live, note.shadow} == {"generate=0", "generate=1"}


def test_prefixes_that_only_a_shadow_reads_are_counted_and_hidden_from_live_operators():
    text = shadowed(JOINT, "strategy: load_balanced", "strategy: prefix_aware")
    found = run(text, prompts_that_share(300), **SHARING)
    tally = found.executor.core.experiments.tallies["route", "elsewhere"]
    assert tally.gain_tokens > 0
    cells = found.executor.core.logic_graph.cells
    assert cells["admission"].state.indexes == {}
    assert cells["route"].state.live.pools["g"].index is None
    assert cells["route"].state.shadow.pools["g"].index is not None


def test_live_and_simulated_runs_disagree_alike():
    text = shadowed(JOINT, "policy: fifo", "policy: cost_optimized")
    text = shadowed(text, "strategy: load_balanced", "strategy: round_robin")
    workload = random_workload(60, RATE)
    ran = live(text, workload)
    simulated = run(text, workload)
    assert notes(simulated.outcome)
    assert [one.note for one in notes(ran)] == [one.note for one in notes(simulated.outcome)]


@dataclass(frozen=True)
class _Gate:
    """Emits requests. It keeps its number of inputs, naps, and fails at one of them."""

    fails_at: int = -1
    nap_s: float = 0.0
    woken: list = field(default_factory=list)
    initial = 0

    def on(self, state, happened, now, draw):
        if isinstance(happened, Wake):
            self.woken.append(now)
        if state == self.fails_at:
            raise RuntimeError("broken")
        wake_at = now if self.nap_s < 0 else now + self.nap_s if self.nap_s else None
        outputs = (Emit(happened.item),) if isinstance(happened, Arrival) else ()
        return Step(state + 1, outputs, wake_at)


@dataclass(frozen=True)
class _GateOptions:
    fails_at: int = -1
    nap_s: float = 0.0


def own_gate(shadow):
    """A core with one operator of the user's, and its shadow."""

    made = []

    def build(options, setup):
        made.append(_Gate(options.fails_at, options.nap_s))
        return made[-1]

    resolver = Resolver()
    port = (Port("in", REQUEST),), (Port("out", REQUEST),)
    spec = OpSpec("gate", *port, options=_GateOptions, signals=frozenset(), decides="gate")
    resolver.register(spec, build)
    text = f"""
    sagellm: 1
    name: own
    operators:
      gate: {{op: gate, shadow: {{{shadow}}}}}
    edges:
      - source -> gate -> sink
    """
    ready = plan(load(text, file="own.yaml").graph, resolver, {})
    return Core(ready), made


def arrive(core, number, now):

    return core.on(Arrived(number, (Request(request_id=f"r{number}"),)), now)


def test_an_error_of_the_shadow_is_reported_once_and_switches_it_off():
    core, _ = own_gate("fails_at: 2")
    effects = [arrive(core, number, float(number)) for number in range(5)]
    faults = [one for some in effects for one in some if isinstance(one, Faulted)]
    assert [(one.fault.node, str(one.fault.error)) for one in faults] == [("gate.shadow", "broken")]
    assert all(isinstance(some[0], Deliver) for some in effects)
    assert core.experiments.num_decisions("gate") == 2
    assert core.meter.logic["gate"].errors.count == 0


@pytest.mark.parametrize("method", ["followed", "predicted", "_placements", "keeps"])
def test_a_router_whose_shadow_fails_goes_on_alone(method, monkeypatch):
    """The shadow fails before its answer, or after the core has taken a placement."""
    alone = run(JOINT)
    text = shadowed(JOINT, "strategy: load_balanced", "strategy: random")
    simulation = Simulation(text)
    shadow = simulation.executor.plan.logic["route"].shadow
    kind, working = type(shadow), getattr(type(shadow), method)

    def broken(router, state, *arguments):
        if router is shadow and simulation.timeline.now > 1.0:
            raise SystemExit
        return working(router, state, *arguments)

    monkeypatch.setattr(kind, method, broken)
    simulation.run(random_workload(300, RATE))
    assert decided(simulation.outcome) == decided(alone.outcome)
    experiments = simulation.executor.core.experiments
    faults = [one for _, _, effects in simulation.outcome.events for one in effects]
    faults = [one.fault.node for one in faults if isinstance(one, Faulted)]
    assert faults == ["route.shadow"]
    assert experiments.fault("route") is not None
    assert 0 < experiments.num_decisions("route") < 300


def test_a_shadow_that_never_sleeps_is_woken_a_thousand_times_a_second_at_most():

    core, (gate, shadow) = own_gate("nap_s: -1.0")
    arrive(core, 0, 1.0)
    (wake,) = [one for one in core.on(TimeCame(), 1.0) if hasattr(one, "at_s")]
    assert wake.at_s == pytest.approx(1.001)
    core.on(TimeCame(), 1.001)
    assert gate.woken == []
    assert shadow.woken == [1.001]


def mistakes(text):
    graph = load(text, file="graph.yaml").graph
    facts = Facts(names={"policies": frozenset({"fifo", "fair"})})
    return check(graph, RESOLVER.vocabulary, facts)


@pytest.mark.parametrize(
    ("option", "path", "message", "hint"),
    [
        ("shadow: {polcy: fair}", "polcy", "no option `polcy`", "policy"),
        ("shadow: {policy: fare}", "policy", "names nothing known: `fare`", "fair"),
        ("shadow: {window: 0}", "window", "must be at least 1", "at least 1"),
        ("shadow: {}", "shadow", "must be a mapping of the options that differ", "policy: ..."),
        ("shadow: fair", "shadow", "must be a mapping of the options that differ", "policy: ..."),
    ],
)
def test_mistakes_in_the_options_of_a_shadow_are_found_at_their_place(option, path, message, hint):
    (found,) = mistakes(JOINT.replace("policy: fifo", f"policy: fifo, {option}"))
    assert found.path[:3] == ("operators", "sort", "shadow")
    assert path in found.path
    assert message in found.message
    assert hint in found.hint


def test_an_operator_that_decides_nothing_takes_no_shadow():
    (found,) = mistakes(JOINT.replace("op: metrics_sink", "op: metrics_sink, shadow: {a: 1}"))
    assert found.path == ("operators", "metrics", "shadow")
    assert "admission, pd_split, policy_sort, route can have a shadow" in found.hint


@pytest.mark.parametrize(
    ("option", "said"),
    [
        ("policy: fair, policy_options: {weight: 1}", "has no option `weight`"),
        ("policy: fifo, late: refuse", "policy fifo does not use late"),
    ],
)
def test_mistakes_that_only_building_finds_are_at_the_shadow(option, said):
    text = JOINT.replace("policy: fifo", f"policy: fifo, shadow: {{{option}}}")
    with pytest.raises(GraphError) as raised:
        Simulation(text)
    (found,) = raised.value.diagnostics
    assert found.path[:3] == ("operators", "sort", "shadow")
    assert said in found.message


def test_a_shadow_is_built_with_the_setup_of_its_operator():
    text = shadowed(JOINT, "max_queued: 100000", "max_queued: 2")
    graph = load(text, file="graph.yaml").graph
    made = plan(graph, RESOLVER, {"g": 1}).logic["admission"]
    assert (made.live.options.max_queued, made.shadow.options.max_queued) == (100000, 2)
    assert made.live.name == made.shadow.name == Setup("admission").name
    assert made.options is made.live.options
