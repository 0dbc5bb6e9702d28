"""What holds for every policy, played through a core: see the table of docs/policies.md."""

import random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from played_core import Played, play

from sagellm.operators.policies import POLICIES
from sagellm.runtime.messages import Request, Stamps
from sagellm.runtime.sampling import Sampling

SPEED = 1000.0  # prompt tokens a second


def ask(name: str, at: float, tokens: int, **fields: Any) -> Request:
    return Request(
        request_id=name,
        stamps=Stamps(arrived_s=at),
        prompt_token_ids=(len(name), *range(tokens - 1)),
        sampling=Sampling(max_tokens=1),
        **fields,
    )


def service_s(request: Request) -> float:
    return len(request.prompt_token_ids) / SPEED


DRAWN = st.lists(
    st.builds(
        lambda at, tokens, priority, user, model, slo, budget: {
            "at": at, "tokens": tokens, "priority": priority, "user_id": user, "model": model,
            "slo_ttft_s": slo, "cost_budget": budget,
        },
        st.floats(0, 5), st.integers(1, 800), st.integers(0, 4), st.sampled_from("ab"),
        st.sampled_from(["", "m"]), st.none() | st.floats(0.1, 5), st.none() | st.floats(0, 4),
    ),
    max_size=25,
)  # fmt: skip


def requests_of(drawn: list[dict[str, Any]]) -> list[Request]:
    return [ask(str(number), **fields) for number, fields in enumerate(drawn)]


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(sorted(POLICIES)), DRAWN, st.integers(1, 2))
def test_every_policy_is_work_conserving_and_deterministic(
    policy: str, drawn: Any, slots: int
) -> None:
    requests = requests_of(drawn)
    played = play(policy, requests, service_s, slots=slots)
    assert played.order == play(policy, requests, service_s, slots=slots).order
    assert sorted(played.order) == sorted(one.request_id for one in requests)
    for now, request in played.sent:
        # Whoever is sent later than it came found all slots busy until that moment.
        busy = [
            one.request_id
            for at, one in played.sent
            if at < now and played.first_token_s[one.request_id] >= now
        ]
        assert now == request.stamps.arrived_s or len(busy) >= slots


def wait_of_a_victim(policy: str, victim: Request, favoured: Any, **options: Any) -> float:
    """How long the victim waits on an engine that gets twice the favoured requests it can take."""
    requests = [victim, *(favoured(number, number * 0.05) for number in range(4000))]
    played = play(policy, requests, lambda one: 0.1, until_s=190.0, **options)
    sent = {request.request_id: at for at, request in played.sent}
    return sent.get("victim", float("inf")) - victim.stamps.arrived_s


def test_weighted_shortest_prefill_starves_none_unless_told_so() -> None:
    """The victim has 16 times the length and a quarter of the weight: 6 doublings."""
    victim = ask("victim", 1.0, 1600, priority=4)

    def wait_s(doubling_s: float) -> float:
        return wait_of_a_victim(
            "weighted_shortest_prefill",
            victim,
            lambda number, at: ask(f"r{number}", at, 100),
            doubling_s=doubling_s,
            prefill_tokens_per_s=SPEED,
        )

    # Overtaken by the 260 that come until 1 + 6 * 2 s, it is sent at 26 s.
    assert wait_s(2.0) == pytest.approx(25.0, abs=0.3)
    assert wait_s(0.0) == float("inf")


def test_fair_starves_none() -> None:
    victim = ask("victim", 1.0, 4096, user_id="small")
    wait_s = wait_of_a_victim(
        "fair", victim, lambda number, at: ask(f"r{number}", at, 512, user_id="large")
    )
    assert 0.5 <= wait_s <= 0.1 * (4096 / 512 + 2)  # as many requests as have its tokens


def test_aegaeon_starves_none() -> None:
    victim = ask("victim", 1.0, 10, model="rare")
    wait_s = wait_of_a_victim(
        "aegaeon",
        victim,
        lambda number, at: ask(f"r{number}", at, 100, model="popular"),
        policy_options={"quota_tokens": 2000},
    )
    # At most two groups are before its own: the one that is served, and a full one.
    assert 0.5 <= wait_s <= 0.1 * (2 * 2000 / 100 + 2)


def goodput(played: Played, requests: list[Request]) -> float:
    """The share of requests whose first token came in time."""
    limits = {one.request_id: one.stamps.arrived_s + (one.slo_ttft_s or 0) for one in requests}
    return sum(at <= limits[name] for name, at in played.first_token_s.items()) / len(requests)


def loaded(load: float, seed: int) -> list[Request]:
    """Poisson arrivals for 300 s; objectives of 2 to 10 times a mean prefill of 0.5 s."""
    draw, now, found = random.Random(seed), 0.0, list[Request]()
    while now < 300.0:
        now += draw.expovariate(load / 0.5)
        tokens = draw.choice((200, 400, 900))
        found.append(ask(f"r{len(found)}", now, tokens, slo_ttft_s=draw.uniform(1.0, 5.0)))
    return found


@pytest.mark.parametrize("seed", range(3))
def test_orders_by_slack_beat_fifo_on_goodput_at_1_2_times_the_capacity(seed: int) -> None:
    requests = loaded(1.2, seed)
    reached = {
        policy: goodput(play(policy, requests, service_s, **options), requests)
        for policy, options in (
            ("fifo", {}),
            ("slo_aware", {}),
            ("least_slack", {}),
        )
    }
    refusing = play("least_slack", requests, service_s, late="refuse")
    assert reached["slo_aware"] > reached["fifo"]
    assert reached["least_slack"] > reached["slo_aware"]  # what is late has no grace
    assert goodput(refusing, requests) >= reached["least_slack"] - 0.01
    refused = [name for name, reason in refusing.ended.items() if reason == "refused"]
    assert len(refused) + len(refusing.sent) == len(requests)
    assert refused
