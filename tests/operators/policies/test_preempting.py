"""The option `preempts`: which classes it accepts, who goes first, and what is claimed."""

from typing import Any

import pytest
from msgspec.structs import replace

from sagellm import Graph, ops
from sagellm.builder import RESOLVER
from sagellm.graphs.diagnostics import GraphError
from sagellm.operators.policies import PolicySortOptions
from sagellm.operators.policies.preempting import read_classes
from sagellm.operators.policy_sort import build
from sagellm.runtime.messages import PRIORITIES, Request, Stamps
from sagellm.runtime.operator import Arrival, Draw, Offer, Setup
from sagellm.runtime.plan import plan

PATH = ("operators", "sort", "preempts")
DRAW = Draw(0, "sort", 0)


def ask(name: str, priority: str, arrived_s: float = 0.0) -> Request:
    stamps = Stamps(arrived_s=arrived_s)
    return Request(
        request_id=name, priority=PRIORITIES[priority], prompt_token_ids=(1,), stamps=stamps
    )


def sort(**options: Any) -> Any:
    return build(PolicySortOptions(**{"preempts": {"critical": "low"}, **options}), Setup("sort"))


def offered(operator: Any, *requests: Request) -> Offer:
    """The last offer after the requests have come."""
    state, outputs = operator.initial, ()
    for request in requests:
        step = operator.on(state, Arrival(request), request.stamps.arrived_s, DRAW)
        state, outputs = step.state, step.outputs or outputs
    return next(one for one in reversed(outputs) if isinstance(one, Offer))


@pytest.mark.parametrize(
    ("table", "victims"),
    [
        ({}, {}),
        ({"critical": "low"}, {0: 3}),
        ({"high": "background"}, {0: 4, 1: 4}),
        ({"critical": "normal", "normal": "background"}, {0: 2, 1: 4, 2: 4}),
        ({"critical": "background", "normal": "low"}, {0: 3, 1: 3, 2: 3}),
    ],
)
def test_a_class_may_preempt_what_less_urgent_classes_may(
    table: dict[str, str], victims: dict[int, int]
) -> None:
    assert read_classes(table, PATH).victims == victims


@pytest.mark.parametrize(
    ("table", "message", "hint"),
    [
        ({"critical": "backgrund"}, "no class of priority is called `backgrund`", "`background`"),
        ({"criticl": "low"}, "no class of priority is called `criticl`", "`critical`"),
        ({"low": "normal"}, "`low` cannot preempt `normal`, which is not below it", "background"),
        ({"high": "high"}, "`high` cannot preempt `high`, which is not below it", "normal, low"),
        ({"background": "background"}, "`background` cannot preempt `background`", "leave it out"),
    ],
)
def test_a_wrong_class_is_refused_with_the_place(
    table: dict[str, str], message: str, hint: str
) -> None:
    graph = Graph("g").engine("g", model="null", device="null")
    ready = (graph >> ops.policy_sort(preempts=table) >> ops.generate(engine="g")).ir
    with pytest.raises(GraphError) as caught:
        plan(ready, RESOLVER, {"g": 1})
    (found,) = caught.value.diagnostics
    assert message in found.message
    assert hint in (found.hint or "")
    assert found.path == ("operators", "policy_sort", "preempts", *table)


@pytest.mark.parametrize("policy", ["fair", "longest_prefix_match"])
def test_a_policy_that_chooses_itself_is_refused(policy: str) -> None:
    with pytest.raises(ValueError, match="leave preempts out, or choose another policy"):
        sort(policy=policy)


@pytest.mark.parametrize("policy", ["fifo", "priority", "slo_aware", "cost_optimized", "adaptive"])
def test_preempting_classes_go_first_by_class_and_then_by_policy(policy: str) -> None:
    operator = sort(policy=policy, preempts={"high": "low"})
    names = [("a", "normal"), ("b", "high"), ("c", "critical"), ("d", "critical"), ("e", "low")]
    requests = [ask(*one, arrived_s=float(place)) for place, one in enumerate(names)]
    state = operator.initial
    for request in requests:
        state = operator.on(state, Arrival(request), request.stamps.arrived_s, DRAW).state
    found = operator.classes.head(state, 8)
    assert [entry[3].request_id for entry in found] == ["c", "d", "b", "a", "e"]
    assert [entry[3].request_id for entry in operator.classes.head(state, 4)] == list("cdba")


def test_only_preempting_classes_claim() -> None:
    offer = offered(sort(), ask("a", "background"), ask("b", "critical", 1.0))
    (claim,) = offer.claims
    assert (claim.request.request_id, claim.least_priority) == ("b", PRIORITIES["low"])
    assert claim.wait_s == float("inf")  # nothing was served yet
    assert claim.token_s == 1e-3  # the usual speed
    assert not offered(sort(preempts={}), ask("b", "critical")).claims


def test_a_request_that_must_not_wait_claims_nothing() -> None:
    """It ends at once, and a victim would be preempted in vain."""
    offer = offered(sort(), replace(ask("a", "critical"), no_queue=True))
    assert offer.claims == ()


def test_without_the_option_first_tokens_are_not_reported() -> None:
    assert "first_token" not in sort(preempts={}).subscribes
    assert "first_token" in sort().subscribes
