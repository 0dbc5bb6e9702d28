"""Tenants and models take turns."""

from collections import Counter
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from played_core import play

from sagellm.operators.policies.order import PolicySortOptions
from sagellm.operators.policies.turns import Aegaeon, AegaeonState
from sagellm.operators.policy_sort import build
from sagellm.runtime.feedback import CreditChanged
from sagellm.runtime.forecast import Forecast
from sagellm.runtime.messages import Request, Stamps
from sagellm.runtime.operator import Arrival, Offer, OfferTaken, Setup, Signal, Wake
from sagellm.runtime.sampling import Sampling

ONE_TOKEN = Sampling(max_tokens=1)


def ask(name: str, user_id: str = "", tokens: int = 100, at: float = 0.0, **fields: Any) -> Request:
    return Request(
        request_id=name,
        user_id=user_id,
        prompt_token_ids=(1,) * tokens,
        sampling=ONE_TOKEN,
        stamps=Stamps(arrived_s=at),
        **fields,
    )


def sorter(running: Any, policy: str, window: int = 4, **policy_options: Any) -> Any:
    if policy == "fair":
        policy_options.setdefault("output_weight", 0.0)
    options = PolicySortOptions(policy, window=window, policy_options=policy_options)
    return running(build(options, Setup("sort")))


def take(sort: Any, outputs: Any, now: float = 0.0) -> tuple[str, Any]:
    """Take the first offered request: its id, and the next outputs."""
    (offer,) = [output for output in outputs if isinstance(output, Offer)]
    return offer.items[0].request_id, sort(OfferTaken(offer.items[0]), now)


def drained(sort: Any, outputs: Any, now: float = 0.0) -> list[str]:
    taken = []
    while any(isinstance(output, Offer) for output in outputs):
        name, outputs = take(sort, outputs, now)
        taken.append(name)
    return taken


def fill(sort: Any, *requests: Request, now: float = 0.0) -> Any:
    """All arrive while the engine is full; then the outputs after it got room."""
    for request in requests:
        sort(Arrival(request), now)
    return again(sort, now)


def again(sort: Any, now: float = 0.0) -> Any:
    """The outputs after the engine got room."""
    return sort(CreditChanged(node="generate", num_left=1.0), now)


# ---- fair --------------------------------------------------------------------------------------


def test_rounds_by_hand(running: Any) -> None:
    """Quantum 100. a: 250 needs round 2, then 50 is within the 50 left. b: 100 in rounds 0, 1."""
    sort = sorter(running, "fair", quantum_tokens=100)
    requests = [ask("a1", "a", 250), ask("a2", "a", 50), ask("b1", "b"), ask("b2", "b")]
    outputs = fill(sort, *requests, ask("b3", "b"), ask("b4", "b"))
    assert drained(sort, outputs) == ["b1", "b2", "a1", "a2", "b3", "b4"]


def test_the_offer_shows_the_next_turns(running: Any) -> None:
    sort = sorter(running, "fair", quantum_tokens=100)
    outputs = fill(sort, *(ask(f"{user}{n}", user) for user in "ab" for n in range(3)))
    (offer,) = [output for output in outputs if isinstance(output, Offer)]
    assert [item.request_id for item in offer.items] == ["a0", "b0", "a1", "b1"]


def test_weights_share_the_tokens(running: Any) -> None:
    sort = sorter(running, "fair", quantum_tokens=100, weights={"a": 3.0})
    outputs = fill(sort, *(ask(f"{user}{n}", user) for user in "ab" for n in range(9)))
    assert [name[0] for name in drained(sort, outputs)[:8]] == ["a", "a", "a", "b"] * 2


def test_a_tenant_that_comes_has_no_credit_for_the_time_before(running: Any) -> None:
    sort = sorter(running, "fair", quantum_tokens=100)
    outputs = fill(sort, *(ask(f"a{n}", "a") for n in range(8)))
    for _ in range(4):
        _, outputs = take(sort, outputs)
    outputs = fill(sort, *(ask(f"b{n}", "b") for n in range(4)))
    assert [name[0] for name in drained(sort, outputs)] == ["b", "a", "b", "a", "b", "a", "b", "a"]


def test_a_cancelled_request_costs_its_tenant_nothing(running: Any) -> None:
    sort = sorter(running, "fair", quantum_tokens=100)
    fill(sort, ask("a1", "a", 1000), ask("a2", "a"), ask("b1", "b"), ask("b2", "b"))
    sort(Signal("cancel", "a1"))
    assert drained(sort, again(sort)) == ["a2", "b1", "b2"]


def test_an_expired_request_leaves_its_tenant(running: Any) -> None:
    sort = sorter(running, "fair")
    fill(sort, ask("a1", "a", expires_s=1.0), ask("a2", "a"))
    assert drained(sort, (sort(Wake(), 1.0), again(sort, 1.0))[1], 1.0) == ["a2"]


def test_a_tenant_may_be_a_tag_and_its_order_priority(running: Any) -> None:
    sort = sorter(running, "fair", tenant="team", inner="priority", quantum_tokens=100)
    requests = [
        ask("x1", "u", tags={"team": "x"}),
        ask("x2", "u", tags={"team": "x"}, priority=0),
        ask("y1", "u", tags={"team": "y"}),
    ]
    assert drained(sort, fill(sort, *requests)) == ["x2", "y1", "x1"]


def test_a_quota_delays_and_others_go_on(running: Any) -> None:
    """100 tokens a second, 1 s at once: 200 tokens at 0 are paid for at 1 s."""
    sort = sorter(running, "fair", quotas={"a": 100.0})
    outputs = fill(sort, ask("a1", "a", 200), ask("a2", "a"), ask("b1", "b"), ask("b2", "b"))
    assert drained(sort, outputs) == ["a1", "b1", "b2"]
    assert sort.wake_at == 1.0
    assert drained(sort, sort(Wake(), 1.0), 1.0) == ["a2"]
    assert sort.wake_at is None
    assert drained(sort, sort(Arrival(ask("a3", "a")), 1.5), 1.5) == []
    assert sort.wake_at == 2.0
    sort(Signal("cancel", "a3"), 1.6)
    assert sort.wake_at is None
    assert drained(sort, sort(Arrival(ask("a4", "a")), 3.0), 3.0) == ["a4"]


@pytest.mark.parametrize("option", ["weights", "quotas"])
def test_a_weight_or_quota_of_nothing_is_refused(running: Any, option: str) -> None:
    with pytest.raises(ValueError, match=f"{option}: 'a' must have a number above 0"):
        sorter(running, "fair", **{option: {"a": 0.0}})


ARRIVALS = st.lists(
    st.tuples(st.sampled_from("abc"), st.integers(1, 400), st.integers(0, 4)), max_size=40
)


@settings(max_examples=60, deadline=None)
@given(ARRIVALS, st.integers(1, 300))
def test_shares_are_within_a_quantum_and_a_request(running: Any, drawn: Any, quantum: int) -> None:
    """While two tenants wait, their tokens by weight differ by at most that, for any requests."""
    weights = {"a": 2.0, "b": 1.0, "c": 0.5}
    sort = sorter(running, "fair", quantum_tokens=quantum, weights=weights)
    requests = {str(n): ask(str(n), user, size) for n, (user, size, _) in enumerate(drawn)}
    outputs = fill(sort, *requests.values())
    left = Counter(request.user_id for request in requests.values())
    spent: Counter[str] = Counter()
    most = max((size for _, size, _ in drawn), default=0)
    for name in drained(sort, outputs):
        request = requests.pop(name)
        spent[request.user_id] += len(request.prompt_token_ids)
        left[request.user_id] -= 1
        shares = [spent[user] / weights[user] for user in weights if left[user]]
        assert not shares or max(shares) - min(shares) <= quantum + 2 * most / min(weights.values())
    assert requests == {}


def jain(values: list[float]) -> float:
    return sum(values) ** 2 / (len(values) * sum(value * value for value in values))


def overload(load: float = 3.0) -> list[Request]:
    """Four tenants on an engine of 1000 tokens a second for 60 s. The first sends half of all."""
    requests = []
    for user, share in (("greedy", 0.5), ("b", 0.2), ("c", 0.2), ("d", 0.1)):
        size = {"greedy": 400, "b": 100, "c": 50, "d": 150}[user]
        gap_s = size / (1000 * load * share)
        requests += [ask(f"{user}{n}", user, size, n * gap_s) for n in range(int(60 / gap_s))]
    return requests


def served_tokens(policy: str, load: float = 3.0, **options: Any) -> list[float]:
    played = play(
        policy,
        overload(load),
        lambda one: len(one.prompt_token_ids) / 1000,
        until_s=60.0,
        **options,
    )
    tokens: Counter[str] = Counter()
    for _, request in played.sent:
        tokens[request.user_id] += len(request.prompt_token_ids)
    return [float(tokens[user]) for user in ("greedy", "b", "c", "d")]


def test_tenants_get_equal_tokens_at_three_times_the_load() -> None:
    assert jain(served_tokens("fair")) >= 0.99
    assert jain(served_tokens("fifo")) < 0.8


def test_weights_hold_at_three_times_the_load() -> None:
    weights = {"greedy": 2.0, "b": 2.0, "c": 1.0, "d": 1.0}
    tokens = served_tokens("fair", policy_options={"weights": weights})
    assert jain([one / weight for one, weight in zip(tokens, weights.values(), strict=True)]) > 0.99
    assert sum(tokens) >= 0.99 * 60_000  # work-conserving: the engine never idles


def test_a_quota_bounds_the_rate_of_a_tenant() -> None:
    greedy, *_ = served_tokens("fair", policy_options={"quotas": {"greedy": 50.0}})
    assert 60 * 50 - 400 <= greedy <= 61 * 50 + 400


# ---- aegaeon -----------------------------------------------------------------------------------


def of(model: str, number: int, tokens: int = 100) -> Request:
    return ask(f"{model}{number}", tokens=tokens, at=float(number), model=model)


def test_models_are_grouped_and_groups_go_by_arrival(running: Any) -> None:
    sort = sorter(running, "aegaeon", quota_tokens=200)
    requests = [of("a", 0), of("b", 1), of("a", 2), of("a", 3), of("b", 4), of("a", 5)]
    assert drained(sort, fill(sort, *requests)) == ["a0", "a2", "b1", "b4", "a3", "a5"]


def test_no_request_joins_a_group_that_was_passed(running: Any) -> None:
    sort = sorter(running, "aegaeon", quota_tokens=1000)
    outputs = fill(sort, of("a", 0), of("b", 1), of("b", 2))
    first, outputs = take(sort, outputs)
    sort(Arrival(of("a", 3)))  # the engine still has model a
    second, outputs = take(sort, again(sort))
    third, outputs = take(sort, outputs)
    assert [first, second, third] == ["a0", "a3", "b1"]
    sort(Arrival(of("a", 4)))
    sort(Arrival(of("b", 5)))
    assert drained(sort, again(sort)) == ["b2", "b5", "a4"]


def test_a_group_is_as_long_as_its_switch_is_worth() -> None:
    """2 s of switch are a tenth of 20 s: 18 s at the usual 1000 tokens a second."""

    def size(policy: Aegaeon) -> int:
        state: AegaeonState = policy.initial
        for number in range(300):
            rank, state = policy.rank(state, of("a", number), 0.0, Forecast())
            if rank:
                return number * 100
        return 0

    assert size(Aegaeon(switch_s=2.0, switch_share=0.1)) == 18_000
    assert size(Aegaeon(switch_s=0.1, switch_share=0.5)) == 8_200  # quota_tokens is more


def test_grouping_saves_switches() -> None:
    """Three models in turn on one engine, with 0.5 s for each change of the model."""

    def end_s(policy: str, **options: Any) -> float:
        loaded = [""]

        def service_s(request: Request) -> float:
            switch_s = 0.5 if request.model != loaded[0] else 0.0
            loaded[0] = request.model
            return switch_s + 0.1

        requests = [ask(f"r{n}", at=n * 0.05, model="abc"[n % 3]) for n in range(90)]
        return max(play(policy, requests, service_s, **options).first_token_s.values())

    assert end_s("fifo") == pytest.approx(90 * 0.6)
    assert end_s("aegaeon", policy_options={"quota_tokens": 1000}) < 16.0


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(1, 90), st.booleans()), max_size=40))
def test_no_group_is_larger_than_its_quota_and_one_request(running: Any, drawn: Any) -> None:
    sort = sorter(running, "aegaeon", quota_tokens=100)
    sizes: Counter[float] = Counter()
    models: dict[float, set[str]] = {}
    for number, (model, tokens, takes) in enumerate(drawn):
        outputs = sort(Arrival(of(model, number, tokens)))
        entry = sort.state.entry_of(of(model, number, tokens))
        sizes[entry[0]] += tokens
        models.setdefault(entry[0], set()).add(model)
        if takes and any(isinstance(output, Offer) for output in outputs):
            take(sort, outputs)
    assert all(size < 100 + 90 for size in sizes.values())
    assert all(len(names) == 1 for names in models.values())
