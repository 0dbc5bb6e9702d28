"""A policy with options and a state of its own."""

from dataclasses import dataclass, field
from typing import Any

import pytest
from immutables import Map

import sagellm
from sagellm.graphs.diagnostics import GraphError
from sagellm.operators.policies import POLICIES
from sagellm.operators.policy_sort import PolicySortOptions, build
from sagellm.runtime.forecast import Forecast
from sagellm.runtime.messages import Request
from sagellm.runtime.operator import Arrival, OfferTaken, Setup


@dataclass(frozen=True)
class FairShare:
    """Start-time fair queueing: each user's next request starts where the last one ends."""

    tokens_per_share: float = field(default=100.0, metadata={"min": 1.0})

    @property
    def initial(self) -> tuple[float, Map[str, float]]:
        return 0.0, Map()

    def rank(
        self, state: Any, request: Request, now: float, forecast: Forecast
    ) -> tuple[float, Any]:
        reached, ends = state
        begin = max(reached, ends.get(request.user_id, 0.0))
        end = begin + request.num_uncached_tokens / self.tokens_per_share
        return begin, (reached, ends.set(request.user_id, end))

    def taken(self, state: Any, request: Request, now: float) -> Any:
        reached, ends = state
        return reached + 1.0, ends


@pytest.fixture(autouse=True)
def fair(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(POLICIES, "_registered", {})
    sagellm.register_policy("fair_share", FairShare)


def ask(name: str, user_id: str) -> Request:
    return Request(request_id=name, user_id=user_id, prompt_token_ids=(1,) * 200)


def order_of(sort: Any) -> list[str]:
    return [entry[3].request_id for entry in sort.state.entries]


def test_one_user_does_not_go_before_another_again_and_again(running: Any) -> None:
    sort = running(build(PolicySortOptions("fair_share"), Setup("sort")))
    for name, user in (("a1", "a"), ("a2", "a"), ("a3", "a"), ("b1", "b"), ("b2", "b")):
        sort(Arrival(ask(name, user)))
    assert order_of(sort) == ["a1", "b1", "a2", "b2", "a3"]


def test_its_options_come_from_the_graph(running: Any) -> None:
    sort = running(
        build(
            PolicySortOptions("fair_share", policy_options={"tokens_per_share": 1.0}), Setup("sort")
        )
    )
    sort(Arrival(ask("a1", "a")))
    sort(Arrival(ask("a2", "a")))
    assert [entry[0] for entry in sort.state.entries] == [0.0, 200.0]


def test_it_hears_of_what_was_sent(running: Any) -> None:
    sort = running(build(PolicySortOptions("fair_share"), Setup("sort")))
    first = ask("a1", "a")
    sort(Arrival(first))
    sort(OfferTaken(first))
    sort(Arrival(ask("b1", "b")))
    assert [entry[0] for entry in sort.state.entries] == [1.0]


@pytest.mark.parametrize(
    ("policy", "options", "says"),
    [
        ("fair_share", {"tokens_per_shar": 1.0}, "did you mean `tokens_per_share`?"),
        ("fair_share", {"tokens_per_share": 0.0}, "must be at least 1.0"),
        ("fifo", {"x": 1}, "policy `fifo` has no options of its own"),
    ],
)
def test_wrong_options_are_told_as_those_of_operators(policy: str, options: Any, says: str) -> None:
    with pytest.raises(GraphError) as caught:
        build(PolicySortOptions(policy, policy_options=options), Setup("sort"))
    assert says in str(caught.value)
    assert caught.value.diagnostics[0].path[:3] == ("operators", "sort", "policy_options")


def test_a_class_that_is_no_policy_is_refused() -> None:
    with pytest.raises(TypeError, match="class Bare has no initial"):
        sagellm.register_policy("bare", type("Bare", (), {}))
