from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sagellm.operators.route import RouteOptions, build, pools_of
from sagellm.operators.routing import STRATEGIES
from sagellm.operators.routing.view import tokens_of
from sagellm.runtime.feedback import CreditChanged, HealthChanged, LoadReported, Topology
from sagellm.runtime.messages import Request
from sagellm.runtime.operator import Arrival, Setup, Signal, Target
from sagellm.runtime.port import EngineLoad
from sagellm.runtime.sampling import Sampling
from sagellm.runtime.user_code import WrongResult

TARGETS = (Target("prefill", 2, "p"), Target("decode", 3, "d"))


@pytest.fixture
def route(running: Any) -> Any:
    def open_route(strategy: str = "load_balanced", targets: Any = TARGETS) -> Any:
        return running(build(RouteOptions(strategy), Setup("route", targets=targets)))

    return open_route


def load(router: Any, replica: int) -> float:
    """Outstanding tokens of a replica of the engine d."""
    found: float = router.state.replica(("d", replica)).load(tokens_of(ask("x")))
    return found


def ask(name: str, num_tokens: int = 10, **fields: Any) -> Any:
    return Request(
        request_id=name,
        prompt_token_ids=(1,) * num_tokens,
        sampling=Sampling(max_tokens=10),
        **fields,
    )


def place(route: Any, name: str = "r", **fields: Any) -> Any:
    (output,) = route(Arrival(ask(name, **fields)))
    placed, route.state = next(iter(output.choices))
    return placed.placement


def test_every_target_gets_a_replica_and_others_stay(route: Any) -> None:
    placement = place(route(), placement={"before": 7})
    assert placement == {"before": 7, "prefill": 0, "decode": 0}


def test_operators_of_one_engine_share_a_replica(route: Any) -> None:
    targets = (Target("decode", 2, "d"), Target("generate", 2, "d"), Target("other", 1))
    assert [pool.nodes for pool in pools_of(targets)] == [("decode", "generate"), ("other",)]
    router = route("random", targets)
    for number in range(20):
        placement = place(router, str(number))
        assert placement["decode"] == placement["generate"]


def test_without_targets_a_request_passes(route: Any) -> None:
    assert place(route(targets=())) == {}


def test_a_strategy_may_not_choose_a_replica_that_was_removed(route: Any, monkeypatch: Any) -> None:
    """A replica that is down may come back; until then another replica is chosen."""
    monkeypatch.setitem(STRATEGIES._registered, "last", (lambda *_: 2, "in a test"))
    router = route("last", (Target("decode", 3, "d"),))
    router(HealthChanged(node="decode", replica=2, sequence=1, is_up=False))
    assert place(router) == {"decode": 0}
    router(Topology(1, {"d": 3}, frozenset({("d", 2)})))
    with pytest.raises(WrongResult, match="returned 2, a replica of d that was removed; one of"):
        place(router)


def test_the_heavier_replica_is_spared(route: Any) -> None:
    router = route(targets=(Target("prefill", 2, "p"),))
    assert place(router, "big", num_tokens=500) == {"prefill": 0}
    assert [place(router, str(n))["prefill"] for n in range(5)] == [1] * 5


def test_an_ended_request_weighs_nothing(route: Any) -> None:
    router = route(targets=(Target("prefill", 2, "p"),))
    place(router, "big", num_tokens=500)
    place(router, "small")
    router(Signal("forget", "big"))
    assert place(router, "next") == {"prefill": 0}
    for name in ("small", "next"):
        router(Signal("forget", name))
    assert all(known.load(1) == 0 for known in router.state.pools["p"].replicas.values())
    assert len(router.state.placed) == 0


def test_a_replica_that_returned_its_credit_is_idle(route: Any) -> None:
    router = route(targets=(Target("prefill", 2, "p"),))
    place(router, "big", num_tokens=500)
    place(router, "small")
    router(CreditChanged(node="prefill", num_left=9.0, request_id="big"))  # big is in decode by now
    assert place(router, "next") == {"prefill": 0}


def test_requests_of_others_count_as_reported(route: Any) -> None:
    router = route(targets=(Target("decode", 2, "d"),))
    router(
        LoadReported(
            node="decode", replica=0, sequence=2, load=EngineLoad(num_running=3, num_waiting=1)
        )
    )
    assert [place(router, str(n))["decode"] for n in range(4)] == [1] * 4


def test_own_requests_are_not_counted_twice(route: Any) -> None:
    router = route(targets=(Target("decode", 2, "d"),))
    assert [place(router, str(n))["decode"] for n in range(2)] == [0, 1]
    for replica in range(2):
        router(
            LoadReported(node="decode", replica=replica, sequence=1, load=EngineLoad(num_running=1))
        )
    loads = [load(router, replica) for replica in range(2)]
    assert loads == [20, 20]


def test_a_report_older_than_a_placement_takes_nothing_off(route: Any) -> None:
    router = route(targets=(Target("decode", 2, "d"),))
    router(LoadReported(node="decode", replica=0, sequence=1, load=EngineLoad()))
    place(router, "heavy", num_tokens=90)
    assert load(router, 0) == 100


def test_the_latest_report_wins(route: Any) -> None:
    router = route(targets=(Target("decode", 2, "d"),))
    router(LoadReported(node="decode", replica=0, sequence=5, load=EngineLoad()))
    router(LoadReported(node="decode", replica=0, sequence=4, load=EngineLoad(num_running=9)))
    assert load(router, 0) == 0


def test_reports_of_two_operators_of_one_engine_do_not_hide_each_other(route: Any) -> None:
    router = route(targets=(Target("decode", 2, "d"), Target("generate", 2, "d")))
    router(LoadReported(node="decode", replica=0, sequence=5, load=EngineLoad()))
    router(LoadReported(node="generate", replica=0, sequence=1, load=EngineLoad(num_running=1)))
    assert load(router, 0) == 20


def test_news_of_strangers_change_nothing(route: Any) -> None:
    router = route()
    before = router.state
    router(LoadReported(node="elsewhere", replica=0, sequence=1, load=EngineLoad()))
    router(CreditChanged(node="elsewhere", replica=0, sequence=1, num_left=9.0))
    router(Signal("forget", "unknown"))
    assert router.state == before


@settings(max_examples=50, deadline=None)
@given(
    st.sampled_from(sorted(STRATEGIES)),
    st.integers(1, 5),
    st.lists(st.tuples(st.integers(0, 9), st.sampled_from(["place", "forget", "credit"]))),
)
def test_only_replicas_that_exist_are_chosen(
    running: Any, strategy: str, num_replicas: int, steps: Any
) -> None:
    targets = (Target("prefill", num_replicas, "p"), Target("decode", 2, "d"))
    router = running(build(RouteOptions(strategy), Setup("route", targets=targets)))
    for number, step in steps:
        if step == "place":
            placement = place(router, str(number), user_id=str(number % 3))
            assert 0 <= placement["prefill"] < num_replicas
            assert 0 <= placement["decode"] < 2
        elif step == "forget":
            router(Signal("forget", str(number)))
        else:
            router(CreditChanged(node="decode", replica=number % 2, num_left=9.0))
    for pool in router.state.pools.values():
        assert all(known.load(1) >= 0 for known in pool.replicas.values())
        assert all(known.num_held >= 0 for known in pool.replicas.values())


def health(route: Any, node: str, number: int, *, is_up: bool) -> None:
    route(HealthChanged(node=node, replica=number, is_up=is_up))


@pytest.mark.parametrize("strategy", ["load_balanced", "round_robin", "random"])
def test_a_replica_that_came_later_is_chosen_too(route: Any, strategy: str) -> None:
    router = route(strategy, (Target("prefill", 1, "p"),))
    assert {place(router, f"a{n}")["prefill"] for n in range(9)} == {0}
    health(router, "prefill", 1, is_up=True)
    assert {place(router, f"b{n}")["prefill"] for n in range(30)} == {0, 1}
    health(router, "prefill", 1, is_up=False)
    assert {place(router, f"c{n}")["prefill"] for n in range(9)} == {0}


def test_what_a_lost_replica_had_is_not_held_against_it(route: Any) -> None:
    router = route(targets=(Target("prefill", 2, "p"),))
    router(LoadReported(node="prefill", replica=1, sequence=1, load=EngineLoad(num_running=50)))
    assert place(router, "a")["prefill"] == 0
    health(router, "prefill", 1, is_up=False)
    health(router, "prefill", 1, is_up=True)
    assert place(router, "b")["prefill"] == 1


def test_what_has_left_a_replica_is_not_counted_by_its_last_report(route: Any) -> None:
    router = route(targets=(Target("decode", 2, "d"),))
    place(router, "a")
    router(LoadReported(node="decode", replica=0, sequence=1, load=EngineLoad(num_running=2)))
    router(CreditChanged(node="decode", replica=0, num_left=9.0, request_id="a"))
    assert load(router, 0) == 20  # that of somebody else
