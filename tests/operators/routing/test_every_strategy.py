"""What holds for every shipped strategy: properties over arbitrary histories of a router."""

from collections import Counter, deque
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sagellm.operators.route import RouteOptions, build
from sagellm.operators.routing import STRATEGIES
from sagellm.runtime.feedback import (
    CreditChanged,
    FirstToken,
    HealthChanged,
    LoadReported,
    Topology,
)
from sagellm.runtime.messages import Request
from sagellm.runtime.operator import Arrival, EmitFirst, Setup, Signal, Target, Wait
from sagellm.runtime.port import EngineLoad
from sagellm.runtime.sampling import Sampling

OURS = sorted(STRATEGIES.ours)
SIZE = 4
OPTIONS: dict[str, Any] = {
    "weighted_round_robin": {"weights": {"p": [5, 1, 2], "d": [1, 3]}},
    "topology_aware": {"places": {"p": ["r1/a", "r1/b", "r2/a"], "d": ["r2/a", "r1/a"]}},
    "affinity": {"load_factor": 1.25},
}
PAIRS = Setup("route", (Target("prefill", SIZE, "p", is_next=True), Target("decode", 2, "d")))
POOL = Setup("route", (Target("generate", SIZE, "g", is_next=True),))

requests = st.tuples(
    st.just("request"), st.integers(0, 5), st.integers(1, 60), st.sampled_from([None, 0.1, 5.0])
)
steps = st.one_of(
    requests,
    requests,  # twice: half of all steps
    st.tuples(st.just("credit"), st.integers(0, SIZE - 1), st.sampled_from([0.0, 1.0, 3.0])),
    st.tuples(st.just("health"), st.integers(0, SIZE - 1), st.booleans()),
    st.tuples(st.just("load"), st.integers(0, SIZE - 1), st.integers(0, 9)),
    st.tuples(st.just("token"), st.integers(0, SIZE - 1), st.floats(0.001, 9.0)),
    st.tuples(st.just("forget"), st.integers(0, 30)),
    st.tuples(st.just("removed"), st.integers(0, 1)),
)


def request_of(number: int, group: int, num_tokens: int, slo_ttft_s: float | None) -> Request:
    return Request(
        request_id=str(number),
        prompt_token_ids=(*[group] * 40, *[number] * num_tokens),
        sampling=Sampling(max_tokens=10),
        user_id=str(group),
        tags={"place": "r2/a"} if group else {},
        slo_ttft_s=slo_ttft_s,
    )


def feedback_of(step: Any, number: int) -> Any:
    match step:
        case ("credit", replica, num_left):
            return CreditChanged(node="prefill", replica=replica, num_left=num_left)
        case ("health", replica, is_up):
            return HealthChanged(node="prefill", replica=replica, is_up=is_up)
        case ("load", replica, num_running):
            load = EngineLoad(num_running=num_running, num_steps=number)
            return LoadReported(node="prefill", replica=replica, sequence=number, load=load)
        case ("token", replica, seconds):
            return FirstToken(
                node="prefill",
                replica=replica,
                seconds=seconds,
                num_computed_tokens=40,
                computed_s=seconds / 2,
            )
        case ("forget", name):
            return Signal("forget", str(name))
        case ("removed", num_removed):
            gone = frozenset(("p", SIZE - 1 - one) for one in range(num_removed))
            return Topology(number, {"p": SIZE, "d": 2}, gone)  # type: ignore[arg-type]


def run(router: Any, history: Any) -> Iterator[tuple[Any, Request | None]]:
    """Give a router a history. Yields the view before each request, and the first placement; None
    where the request waits. The request is placed there.
    """
    for number, step in enumerate(history):
        if step[0] != "request":
            router(feedback_of(step, number), now=0.1 * number)
            continue
        before = router.state
        (output,) = router(Arrival(request_of(number, *step[1:])), now=0.1 * number)
        if isinstance(output, Wait):
            yield before, None
        else:
            assert isinstance(output, EmitFirst)
            assert output.hold_s == 0.0
            placed, router.state = next(iter(output.choices))
            assert isinstance(placed, Request)
            yield before, placed


@pytest.mark.parametrize("strategy", OURS)
@settings(max_examples=40, deadline=None)
@given(st.lists(steps, max_size=40))
def test_the_first_choice_has_room_and_nothing_waits_while_one_has(
    running: Any, strategy: str, history: Any
) -> None:
    options = RouteOptions(strategy, OPTIONS.get(strategy, {}))
    for before, placed in run(running(build(options, PAIRS)), history):
        free = before.pools["p"].free
        assert (placed is None) == (free == 0)
        if placed is not None:
            chosen = before.pools["p"].replicas[placed.placement["prefill"]]
            assert free >> placed.placement["prefill"] & 1
            assert chosen.is_up
            assert chosen.num_left >= 1
            assert not chosen.is_removed
            assert placed.placement["decode"] in (0, 1)


@pytest.mark.parametrize("strategy", OURS)
@settings(max_examples=20, deadline=None)
@given(st.lists(steps, max_size=40))
def test_equal_histories_have_equal_placements(running: Any, strategy: str, history: Any) -> None:
    options = RouteOptions(strategy, OPTIONS.get(strategy, {}))
    first, second = (
        [placed and placed.placement for _, placed in run(running(build(options, PAIRS)), history)]
        for _ in range(2)
    )
    assert first == second


@pytest.mark.parametrize("strategy", OURS)
@pytest.mark.parametrize("num_in_flight", [1, 3, 16])
def test_no_replica_starves_under_equal_load(
    running: Any, strategy: str, num_in_flight: int
) -> None:
    """Each replica gets at least a quarter of its share of equal requests of different users.

    There are `num_in_flight` requests at a time; the oldest ends first.
    """
    router, counts = running(build(RouteOptions(strategy), POOL)), Counter[int]()
    open_requests = deque[tuple[str, int]]()
    for number in range(400):
        now = 0.1 * number
        request = Request(
            request_id=str(number),
            prompt_token_ids=(number,) * 100,
            sampling=Sampling(max_tokens=10),
            user_id=str(number),
        )
        (output,) = router(Arrival(request), now=now)
        placed, router.state = next(iter(output.choices))
        replica = placed.placement["generate"]
        counts[replica] += 1
        open_requests.append((request.request_id, replica))
        if len(open_requests) >= num_in_flight:
            end(router, *open_requests.popleft(), now=now)
    assert min(counts[replica] for replica in range(SIZE)) >= 400 // SIZE // 4


def end(router: Any, request_id: str, replica: int, now: float) -> None:
    """All replicas are equally fast: 0.05 s for a prompt, and 10 ms for a step."""
    first = FirstToken(seconds=0.05, num_computed_tokens=100, computed_s=0.05)
    for happened in (
        first,
        LoadReported(sequence=round(10 * now) + 1, load=EngineLoad(num_steps=round(100 * now))),
        CreditChanged(num_left=99.0, request_id=request_id),
    ):
        router(named(happened, replica), now=now)
    router(Signal("forget", request_id), now=now)


def named(happened: Any, replica: int) -> Any:
    fields = {name: getattr(happened, name) for name in happened.__struct_fields__}
    return type(happened)(**{**fields, "node": "generate", "replica": replica})
