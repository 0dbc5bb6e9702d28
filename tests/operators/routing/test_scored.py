"""least_connections, least_response_time and predicted_latency against their definitions."""

import math
from typing import Any

import pytest

from sagellm.operators.routing.scored import LeastConnections, LeastResponseTime, PredictedLatency
from sagellm.operators.routing.strategy import Candidates
from sagellm.operators.routing.view import ReplicaPool, RouterView
from sagellm.runtime.feedback import FirstToken, LoadReported
from sagellm.runtime.messages import Request, Stamps
from sagellm.runtime.operator import Draw
from sagellm.runtime.port import EngineLoad
from sagellm.runtime.sampling import Sampling

POOL = ReplicaPool("g", 3, ("generate",), ("generate",))


def ask(name: str = "r", num_tokens: int = 100, max_tokens: int = 10, **fields: Any) -> Request:
    sampling = Sampling(max_tokens=max_tokens)
    prompt = tuple(range(num_tokens))
    return Request(request_id=name, prompt_token_ids=prompt, sampling=sampling, **fields)


def order(strategy: Any, view: RouterView, request: Request | None = None, now: float = 0.0) -> Any:
    candidates = Candidates(view.pools["g"], request or ask(), view.num_routed)
    found, _ = strategy.order(None, candidates, now, Draw(0, "route", 0))
    return found


def sent(view: RouterView, number: int, *requests: Request) -> RouterView:
    for request in requests:
        view = view.place(request, (("g", number),))
    return view


def full(view: RouterView, number: int) -> RouterView:
    return view.take_back(("g", number), "", 0.0)


def first_token(view: RouterView, number: int, seconds: float, now: float = 0.0) -> RouterView:
    return view.measured(("g", number), FirstToken(seconds=seconds), now)


def prefilled(view: RouterView, number: int, num_tokens: int, seconds: float) -> RouterView:
    first = FirstToken(seconds=seconds, num_computed_tokens=num_tokens, computed_s=seconds)
    return view.measured(("g", number), first, 0.0)


def stepped(view: RouterView, number: int, num_running: int, step_s: float) -> RouterView:
    """Two reports of a replica, ten steps apart."""
    for num_steps in (10, 20):
        load = EngineLoad(num_running=num_running, num_steps=num_steps)
        happened = LoadReported(node="generate", replica=number, load=load)
        view = view.measured(("g", number), happened, num_steps * step_s)
    return view


def test_the_fewest_requests_win_however_long_they_are() -> None:
    strategy = LeastConnections()
    view = RouterView.of((POOL,), strategy)
    view = sent(view, 0, ask("long", 5000))
    view = sent(view, 1, ask("a", 1), ask("b", 1))
    view = sent(view, 2, ask("c", 1), ask("d", 1))
    assert order(strategy, view) == 0
    view = sent(view, 0, ask("e", 1), ask("f", 1))
    assert order(strategy, view) in (1, 2)
    reported = EngineLoad(num_running=9)  # requests of another router
    assert order(strategy, view.report(("g", 1), "generate", 1, reported)) == 2
    assert order(strategy, full(view.report(("g", 1), "generate", 1, reported), 2)) == 0


def test_response_time_times_queue() -> None:
    """Scores: 0.2 * 3, 0.5 * 1, 0.4 * 2 seconds."""
    strategy = LeastResponseTime()
    view = RouterView.of((POOL,), strategy)
    for number, (seconds, num_requests) in enumerate(((0.2, 2), (0.5, 0), (0.4, 1))):
        view = first_token(view, number, seconds)
        view = sent(view, number, *(ask(f"{number}-{n}") for n in range(num_requests)))
    known = view.pools["g"].replicas
    scores = [math.exp(strategy.score(known[number])) for number in range(3)]
    assert scores == pytest.approx([0.6, 0.5, 0.8])
    assert order(strategy, view) == 1
    assert order(strategy, full(view, 1)) == 0


def test_the_latest_response_weighs_an_eighth() -> None:
    view = first_token(RouterView.of((POOL,)), 0, 1.0)
    speed = first_token(view, 0, 0.2).pools["g"].replicas[0].speed
    assert speed.first_token_s == pytest.approx(0.9)


def test_a_slow_measurement_fades_with_its_age() -> None:
    """4 s measured 20 s ago count as 4 * exp(-2) = 0.54 s."""
    strategy = LeastResponseTime(decay_s=10.0)
    view = RouterView.of((POOL,), strategy)
    view = first_token(first_token(first_token(view, 0, 4.0), 1, 0.6, now=20.0), 2, 0.6, now=20.0)
    assert order(strategy, view, now=20.0) == 0
    fresh = first_token(first_token(view, 0, 4.0, now=15.0), 0, 4.0, now=15.0)
    assert order(strategy, fresh, now=20.0) != 0


def test_a_cold_replica_is_tried_with_one_request() -> None:
    strategy = LeastResponseTime()
    view = first_token(RouterView.of((POOL,), strategy), 0, 0.001)
    tried = []
    for name in "abc":
        number = order(strategy, view)
        tried.append(number)
        view = sent(view, number, ask(name))
    assert sorted(tried) == [0, 1, 2]  # then the one that is known
    assert order(strategy, view) == 0


def test_where_all_replicas_are_cold_the_load_decides() -> None:
    strategy = LeastResponseTime()
    view = RouterView.of((POOL,), strategy)
    for number, name in enumerate("abc"):
        view = sent(view, number, ask(name, 300 - 100 * number))
    assert order(strategy, view) == 2


def test_a_replica_that_was_lost_is_cold_again() -> None:
    view = first_token(RouterView.of((POOL,), LeastResponseTime()), 1, 9.0)
    back = view.mark(("g", 1), is_up=False).mark(("g", 1), is_up=True)
    assert not back.pools["g"].replicas[1].speed.is_known


def heterogeneous(strategy: Any) -> RouterView:
    """Replica 0 computes 10,000 prompt tokens a second, 1 computes 1,000, 2 is down; steps take 20
    and 10 ms.
    """
    view = RouterView.of((POOL,), strategy).mark(("g", 2), is_up=False)
    for number, tokens_per_s, step_s in ((0, 10_000, 0.02), (1, 1_000, 0.01)):
        view = prefilled(view, number, 1000, 1000 / tokens_per_s)
        view = stepped(view, number, 1, step_s)
    return view


def test_each_replica_is_predicted_by_its_own_speed() -> None:
    """Prompt 100, 10 tokens: replica 0 takes 0.01 + 0.2 s, replica 1 takes 0.1 + 0.1 s."""
    strategy = PredictedLatency()
    view = heterogeneous(strategy)
    assert order(strategy, view, ask(max_tokens=10)) == [1, 0]
    assert order(strategy, view, ask(max_tokens=8)) == [0, 1]  # 0.17 and 0.18 s
    assert order(strategy, view, ask(num_tokens=1000, max_tokens=10)) == [0, 1]  # 0.3 and 1.1 s
    assert order(PredictedLatency(expected_output_tokens=8), view) == [0, 1]


def test_a_backlog_counts_at_the_speed_of_its_replica() -> None:
    """1,900 pending tokens are 0.19 s at replica 0, and 1.9 s at replica 1."""
    strategy = PredictedLatency()
    view = heterogeneous(strategy)
    busy = sent(view, 0, ask("x", 1900))
    assert order(strategy, busy, ask(num_tokens=1000, max_tokens=1)) == [0, 1]  # 0.31 and 1.01 s
    busy = sent(busy, 0, ask("y", 9000))
    assert order(strategy, busy, ask(num_tokens=1000, max_tokens=1)) == [1, 0]  # 1.23 s


def test_a_replica_that_was_never_tried_goes_first_once() -> None:
    strategy = PredictedLatency()
    view = heterogeneous(strategy).mark(("g", 2), is_up=True)
    assert order(strategy, view) == 2
    assert order(strategy, sent(view, 2, ask("x"))) == [1, 0, 2]


def test_an_objective_keeps_the_fast_replica_free() -> None:
    """Of the two that meet 1 s with 0.01 and 0.1 s, the slower one has the least headroom."""
    strategy = PredictedLatency()
    view = heterogeneous(strategy)
    assert order(strategy, view, ask(slo_ttft_s=1.0)) == [1, 0]
    assert order(strategy, view, ask(slo_ttft_s=0.05)) == [0, 1]
    late = ask(slo_ttft_s=1.0, stamps=Stamps(arrived_s=1.0))
    assert order(strategy, view, late, now=1.8) == [1, 0]  # 0.2 s are left
    assert order(strategy, view, late, now=1.95) == [0, 1]  # 0.05 s


def test_headrooms_of_both_objectives_are_weighed() -> None:
    """TTFT headrooms of 1 s: 0.99 and 0.9; TPOT headrooms of 25 ms: 0.2 and 0.6."""
    view = heterogeneous(PredictedLatency())
    asked = ask(slo_ttft_s=1.0)
    assert order(PredictedLatency(slo_tpot_s=0.025), view, asked) == [0, 1]  # 0.832 and 0.84
    both = PredictedLatency(slo_tpot_s=0.025, ttft_weight=1.0)
    assert order(both, view, asked) == [1, 0]


def test_replicas_that_miss_an_objective_come_last_by_what_they_miss() -> None:
    """With one request each, so that neither is idle: TTFT of 0.02 and 0.2 s, steps as before."""
    strategy = PredictedLatency(slo_tpot_s=0.015)
    view = heterogeneous(strategy)
    busy = sent(sent(view, 0, ask("x")), 1, ask("y"))
    assert order(strategy, busy, ask(slo_ttft_s=0.1)) == [0, 1]  # TPOT alone, TTFT alone
    assert order(strategy, busy, ask(slo_ttft_s=1.0)) == [1, 0]  # replica 1 meets both
    idle = sent(view, 0, ask("x"))
    assert order(strategy, idle, ask(slo_ttft_s=0.05)) == [1, 0]  # an idle one before that


def test_a_large_pool_is_compared_in_part() -> None:
    strategy = PredictedLatency()
    pool = ReplicaPool("g", 200, ("generate",), ("generate",))
    view = RouterView.of((pool,), strategy)
    for number in range(200):
        view = prefilled(view, number, 1000, 1.0 if number != 77 else 0.5)
    seen = set()
    for turn in range(20):
        candidates = Candidates(view.pools["g"], ask(), turn)
        found, _ = strategy.order(None, candidates, 0.0, Draw(0, "route", 0))
        assert isinstance(found, list)
        assert len(found) <= 18
        assert found[0] == 77  # by its score
        seen |= set(found)
    assert seen == set(range(200))
