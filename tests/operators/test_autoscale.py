"""autoscale: what it asks for, given what engines and queues report."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from sagellm.graphs.diagnostics import GraphError
from sagellm.operators.autoscale import AutoscaleOptions, build
from sagellm.runtime.feedback import (
    Backlog,
    CreditChanged,
    FirstToken,
    HealthChanged,
    LoadReported,
    QueueChanged,
    ScaleEnded,
    Topology,
)
from sagellm.runtime.messages import EngineReplica, Request
from sagellm.runtime.operator import Arrival, Emit, ScaleEngine, Setup, Target, Wake
from sagellm.runtime.port import EngineFacts, EngineLoad
from sagellm.runtime.sampling import Sampling

FACTS = EngineFacts("m", 4096, 8, block_size=16, num_blocks=100)
JOINT = (Target("generate", 1, "g", True),)
SPLIT = (
    Target("prefill", 1, "p", True, prefills_only=True),
    Target("decode", 1, "d"),
)


def made(targets=JOINT, **options):
    names = {target.engine for target in targets}
    engines = options.pop("engines", {name: {"max": 4, "start_s": 20.0} for name in names})
    facts = dict.fromkeys(names, FACTS)
    return build(
        AutoscaleOptions(engines=engines, **options), Setup("autoscale", targets, facts=facts)
    )


def request(number, num_tokens=100):
    return Request(
        request_id=f"r{number}",
        prompt_token_ids=tuple(range(num_tokens)),
        sampling=Sampling(max_tokens=50),
    )


def report(num_running, *, node="generate", replica=0, steps=0):
    load = EngineLoad(num_running=num_running, num_steps=steps, num_blocks=100)
    return LoadReported(node=node, replica=replica, load=load)


def queued(number, *, served=0, busy_s=0.0):
    return QueueChanged(node="sort", backlog=Backlog(number, num_served=served, busy_s=busy_s))


class Fed:
    """An operator that is woken when it asks for it."""

    def __init__(self, running, operator):
        self.run = running(operator)
        self.asked = []

    def give(self, happened, now):
        while self.run.wake_at is not None and self.run.wake_at <= now:
            self._note(self.run(Wake(), self.run.wake_at))
        self._note(self.run(happened, now))

    def until(self, now):
        while self.run.wake_at is not None and self.run.wake_at <= now:
            self._note(self.run(Wake(), self.run.wake_at))

    def _note(self, outputs):
        self.asked += (one for one in outputs if isinstance(one, ScaleEngine))


@pytest.fixture
def fed(running):
    return lambda operator: Fed(running, operator)


def test_requests_pass_unchanged(running):
    run = running(made())
    first = request(0)
    assert run(Arrival(first), 5.0) == (Emit(first),)
    assert run.wake_at == 15.0
    assert run(Arrival(request(1)), 6.0) == (Emit(request(1)),)
    assert run.wake_at == 15.0


def test_a_rate_above_the_given_capacity_adds_replicas(fed):
    bounds = {"g": {"max": 4, "requests_per_s": 1.0}}
    one = fed(made(engines=bounds, forecast="constant"))
    for number in range(20):
        one.give(Arrival(request(number)), number / 2)
    one.until(10.0)
    # Two requests a second; a replica shall serve 0.8.
    assert one.asked == [ScaleEngine("g", 3, 1, "demand")]


def test_a_rising_rate_adds_replicas_before_it_is_there(fed):
    bounds = {"g": {"max": 9, "start_s": 60.0, "requests_per_s": 1.0}}
    found = {}
    for method in ("constant", "holt"):
        one, number = fed(made(engines=bounds, forecast=method)), 0
        while not one.asked:  # after t seconds, t / 200 requests a second
            number += 1
            one.give(Arrival(request(number)), (400.0 * number) ** 0.5)
        found[method] = (400.0 * number) ** 0.5
    # 0.8 a second, which one replica shall serve, come after 160 s.
    assert found["constant"] > 160.0
    assert found["holt"] < found["constant"] - 10.0  # a decision earlier at least


def test_a_wait_beyond_the_objective_adds_one_replica_at_a_time(fed):
    one = fed(made())
    for second in range(1, 11):
        one.give(report(8, steps=second), float(second))
        one.give(queued(40, served=second, busy_s=float(second)), float(second))
    one.until(11.0)
    assert one.asked == [ScaleEngine("g", 2, 1, "ttft")]
    one.until(100.0)
    assert len(one.asked) == 1  # until the end of the change is reported
    one.give(Topology(1, {"g": 2}), 101.0)
    one.give(HealthChanged(node="generate", replica=1, is_up=True), 101.0)
    one.give(ScaleEnded(node="generate", engine="g"), 101.0)
    one.give(queued(80, served=10, busy_s=100.0), 102.0)
    one.until(112.0)
    assert one.asked[1:] == [ScaleEngine("g", 3, 2, "ttft")]


def test_a_wait_that_ends_before_a_start_does_adds_nothing(fed):
    one = fed(made(engines={"g": {"max": 4, "start_s": 60.0}}))
    for tenth in range(100):  # the backlog shrinks by one request each 0.1 s
        one.give(queued(300 - tenth, served=tenth, busy_s=tenth / 10), tenth / 10)
    one.until(10.0)
    assert one.asked == []


def test_in_a_split_graph_the_bottleneck_gets_the_replica(fed):
    for busy, other, engine in (("prefill", "decode", "p"), ("decode", "prefill", "d")):
        one = fed(made(SPLIT))
        for second in range(1, 11):
            one.give(report(7, node=busy, steps=second), float(second))
            one.give(report(1, node=other, steps=second), float(second))
            one.give(queued(90, served=second, busy_s=float(second)), float(second))
        one.until(11.0)
        assert one.asked == [ScaleEngine(engine, 2, 1, "ttft")]


def test_an_engine_that_few_requests_reach_is_scaled_by_their_share(fed):
    bounds = {name: {"max": 9, "requests_per_s": 1.0} for name in "pd"}
    one, now = fed(made(SPLIT, engines=bounds, forecast="ewma")), 0.0
    for number in range(400):  # four a second; one of four needs the prefill engine
        now = number / 4
        one.give(Arrival(request(number)), now)
        one.give(CreditChanged(node="decode", num_left=1.0, request_id=f"r{number}"), now)
        if not number % 4:
            one.give(CreditChanged(node="prefill", num_left=1.0, request_id=f"r{number}"), now)
    wanted = {asked.engine: asked.num_replicas for asked in one.asked}
    assert wanted == {"p": 2, "d": 5}


@pytest.mark.parametrize(
    ("targets", "num_served"),
    [
        ((Target("prefill", 1, "g", True, prefills_only=True), Target("decode", 1, "g")), 1),
        ((Target("generate", 1, "g", True), Target("decode", 1, "g")), 2),
        ((Target("prefill", 1, "g", True, prefills_only=True),), 1),
    ],
)
def test_a_request_is_served_once_by_each_engine(running, targets, num_served):
    run = running(made(targets))
    for target in targets:
        run(CreditChanged(node=target.node, num_left=1.0, request_id="r"), 0.0)
    assert run.state.pools["g"].num_served == num_served


def test_longer_requests_than_usual_need_more_replicas(fed):
    found = {}
    for factor in (1, 3):
        bounds = {"g": {"max": 9, "requests_per_s": 1.0}}
        one, now = fed(made(engines=bounds, forecast="ewma")), 0.0
        for number in range(1400):
            now = number / 4
            num_tokens = 50 * (factor if number > 1200 else 1)
            one.give(Arrival(request(number, num_tokens)), now)
            one.give(ScaleEnded(node="generate", engine="g"), now)
            last = one.asked[-1].num_replicas if one.asked else 0
        found[factor] = last
    assert found[1] == 5  # four a second, at 0.8 of one
    assert found[3] > 6


def test_replicas_that_are_not_needed_go_after_the_cool_down(fed):
    one = fed(made((Target("generate", 3, "g", True),)))
    one.give(report(1), 0.0)
    one.until(59.0)
    assert one.asked == []
    one.until(70.0)
    assert one.asked == [ScaleEngine("g", 2, 3, "idle")]
    one.give(HealthChanged(node="generate", replica=2, is_up=False), 71.0)
    one.give(Topology(1, {"g": 3}, frozenset({EngineReplica("g", 2)})), 75.0)
    one.give(ScaleEnded(node="generate", engine="g"), 75.0)
    one.until(90.0)
    assert one.asked[1:] == [ScaleEngine("g", 1, 2, "idle")]


def test_an_idle_operator_sleeps_and_wakes_with_the_next_request(fed):
    one = fed(made())
    one.give(Arrival(request(0)), 0.0)
    one.until(1e6)
    assert one.run.wake_at is None
    one.give(Arrival(request(1)), 2e6)
    assert one.run.wake_at == 2e6 + 10


def test_an_operator_with_a_queue_does_not_sleep(fed):
    one = fed(made(slo_ttft_s=None))
    one.give(queued(3), 0.0)
    one.until(500.0)
    assert one.asked == []
    assert one.run.wake_at == 510.0


def test_feedback_of_other_engines_changes_nothing(running):
    run = running(made())
    before = run.state
    for happened in (
        report(9, node="other"),
        CreditChanged(node="other", num_left=1.0, request_id="r"),
        ScaleEnded(node="other", engine="o", error="no"),
    ):
        run(happened, 0.0)
    assert run.state.pools["g"].replicas == before.pools["g"].replicas
    assert run.state.scalings == before.scalings


@pytest.mark.parametrize(
    ("bounds", "message"),
    [
        ({"max": 0}, "`max` must be at least 1"),
        ({"mx": 4, "max": 2}, "`g` has no option `mx`"),
        ({}, "`g` needs `max`"),
        ({"max": 2, "drain_s": -1}, "`drain_s` must be at least 0"),
    ],
)
def test_wrong_bounds_are_refused(bounds, message):
    with pytest.raises(GraphError, match=message):
        made(engines={"g": bounds})


def test_loads_that_would_let_replicas_come_and_go_are_refused():
    with pytest.raises(ValueError, match=r"removal_load: 0.8 is not below target_load 0.8"):
        made(removal_load=0.8)


def test_the_feedback_of_one_time_is_worth_the_same_in_two_runs(running):
    one, other = running(made()), running(made())
    for number in range(50):
        happened = (report(number % 9, steps=number), queued(number % 7), Arrival(request(number)))
        for each in happened:
            assert one(each, float(number)) == other(each, float(number))
    assert one.state == other.state


HAPPENED = st.one_of(
    st.builds(report, st.integers(0, 9), replica=st.integers(0, 5), steps=st.integers(0, 99)),
    st.builds(queued, st.integers(0, 99), served=st.integers(0, 99), busy_s=st.floats(0, 99)),
    st.builds(lambda n: Arrival(request(n)), st.integers(0, 9)),
    st.builds(lambda s: FirstToken(node="generate", seconds=s), st.floats(0, 9)),
    st.builds(
        lambda n, up: HealthChanged(node="generate", replica=n, is_up=up),
        st.integers(0, 5),
        st.booleans(),
    ),
    st.just(CreditChanged(node="generate", num_left=1.0, request_id="r")),
)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(HAPPENED, st.floats(0.0, 30.0), st.booleans()), max_size=60))
def test_whatever_is_reported_the_number_stays_in_bounds(running, events):
    operator = made((Target("generate", 2, "g", True),), engines={"g": {"min": 2, "max": 4}})
    one, now, count, pending = Fed(running, operator), 0.0, 2, None
    for happened, gap_s, ends in events:
        now += gap_s
        one.give(happened, now)
        for asked in one.asked:
            assert pending is None
            assert asked.num_before == count
            assert 2 <= asked.num_replicas <= 4
            pending = asked.num_replicas
        one.asked.clear()
        if pending is not None and ends:
            removed = frozenset(EngineReplica("g", n) for n in range(pending, 4))
            one.give(Topology(1, {"g": 4}, removed), now)
            for number in range(pending):
                one.give(HealthChanged(node="generate", replica=number, is_up=True), now)
            one.give(ScaleEnded(node="generate", engine="g"), now)
            count, pending = pending, None


def test_only_new_requests_are_changed_by_nothing():
    cached = replace(request(0), num_cached_tokens=60)
    operator = made()
    step = operator.on(operator.initial, Arrival(cached), 0.0, None)
    assert step.state.demand.prompts.recent == 40.0
