from collections import Counter
from typing import Any

import pytest

from sagellm.operators.ab_split import ABSplitOptions, arm_of, build
from sagellm.runtime.messages import Request, Stamps
from sagellm.runtime.operator import Arrival, Emit, Setup, Signal


def split(running: Any, **options: Any) -> Any:
    return running(build(ABSplitOptions(**options), Setup("split")))


def arm(running: Any, request: Request, **options: Any) -> str:
    (emit,) = split(running, **options)(Arrival(request))
    assert isinstance(emit, Emit)
    assert emit.item.tags == {**request.tags, "arm": emit.outlet}
    return emit.outlet


def test_the_requests_of_a_user_stay_in_one_arm(running: Any) -> None:
    for user in ("anna", "ben", "carl", "dora"):
        arms = {arm(running, Request(request_id=f"r{n}", user_id=user)) for n in range(20)}
        assert len(arms) == 1


def test_the_arms_are_the_same_in_every_process() -> None:
    arms = "".join(arm_of(f"user_id:{number}", ABSplitOptions()) for number in range(12))
    assert arms == "baababaabbaa"


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 1.0])
def test_b_gets_its_share_of_the_units(share: float) -> None:
    options = ABSplitOptions(share=share)
    counts = Counter(arm_of(f"user_id:{number}", options) for number in range(20_000))
    assert counts["b"] / 20_000 == pytest.approx(share, abs=0.01)


def test_a_greater_share_moves_no_unit_back() -> None:
    before = {n for n in range(1000) if arm_of(str(n), ABSplitOptions(share=0.1)) == "b"}
    after = {n for n in range(1000) if arm_of(str(n), ABSplitOptions(share=0.3)) == "b"}
    assert before < after


def test_another_experiment_assigns_anew() -> None:
    one, other = ABSplitOptions(), ABSplitOptions(experiment="next")
    differ = sum(arm_of(str(n), one) != arm_of(str(n), other) for n in range(2000))
    assert differ / 2000 == pytest.approx(0.5, abs=0.05)


@pytest.mark.parametrize(
    ("key", "fields", "unit"),
    [
        ("user_id", {"user_id": "anna"}, "user_id:anna"),
        ("tenant", {"salt": "acme"}, "tenant:acme"),
        ("tag", {"tags": {"key": "session 7"}}, "tag:session 7"),
        ("request_id", {"user_id": "anna"}, "request_id:r"),
        ("user_id", {}, "request_id:r"),
        ("tag", {"user_id": "anna"}, "request_id:r"),
    ],
)
def test_the_unit_is_the_key_or_else_the_request(
    running: Any, key: Any, fields: Any, unit: str
) -> None:
    operator = split(running, key=key)
    operator(Arrival(Request(request_id="r", **fields)))
    assert [one.unit for one in operator.state.noted] == [unit]


def test_each_choice_is_noted_with_its_arm_and_objective(running: Any) -> None:
    operator = split(running)
    stamps = Stamps(arrived_s=3.0)
    for choice in range(2):
        request = Request(request_id="r", choice=choice, stamps=stamps, slo_ttft_s=0.5)
        (emit,) = operator(Arrival(request))
    first, second = operator.state.noted
    assert (first.key, second.key) == (("r", 0), ("r", 1))
    assert first.label == second.label == emit.outlet
    assert (first.arrived_s, first.slo_ttft_s) == (3.0, 0.5)
    assert operator(Signal("cancel", "r")) == ()
