"""A strategy may hold a request back for a replica until its limit, and no longer."""

import math
from dataclasses import dataclass
from typing import Any

import pytest

from sagellm import Graph, ops
from sagellm.builder import RESOLVER
from sagellm.operators import route as route_module
from sagellm.operators.routing import Hold
from sagellm.runtime.core.core import Core
from sagellm.runtime.core.effects import Effect, Faulted, Send, WakeAt
from sagellm.runtime.core.events import (
    Arrived,
    Opened,
    Released,
    ReplicaMarked,
    Signalled,
    TimeCame,
)
from sagellm.runtime.messages import Request
from sagellm.runtime.operator import Credit, Signal
from sagellm.runtime.plan import plan


@dataclass(frozen=True)
class Patient:
    """Waits for replica 0."""

    limit_s: float = 2.0

    @property
    def initial(self) -> None:
        return None

    def order(self, state: None, candidates: Any, now: float, draw: Any) -> Any:
        limit_s = {"patient": self.limit_s, "most patient": 10.0}.get(candidates.request.user_id)
        if limit_s is not None:
            return (Hold(0, limit_s), *candidates.numbers), None
        return candidates.numbers, None


@pytest.fixture(params=[True, False], ids=["in policy_sort", "before route"])
def core(request: Any, monkeypatch: pytest.MonkeyPatch) -> Core:
    """Two replicas of one place each; the first is taken."""
    monkeypatch.setattr(route_module, "find_strategy", lambda name: Patient)
    graph = Graph("g").engine("g", replicas=2)
    head = graph >> ops.policy_sort() if request.param else graph
    core = Core(plan((head >> ops.route() >> ops.generate(engine="g")).ir, RESOLVER, {"g": 2}))
    for number in (0, 1):
        core.on(Opened("generate", number, Credit(1), 16), 0.0)
    assert sent(arrive(core, "first", 0.0)) == [("first", 0)]
    return core


def arrive(core: Core, name: str, now: float, user_id: str = "") -> list[Effect]:
    one = Request(request_id=name, prompt_token_ids=(1,) * 8, user_id=user_id)
    return core.on(Arrived(1, (one,)), now)


def sent(effects: list[Effect]) -> list[tuple[str, int]]:
    return [(one.item.request_id, one.replica) for one in effects if isinstance(one, Send)]


def wakes(effects: list[Effect]) -> list[float]:
    return [one.at_s for one in effects if isinstance(one, WakeAt)]


def test_a_held_request_goes_where_it_was_held_for(core: Core) -> None:
    assert wakes(arrive(core, "held", 1.0, "patient")) == [3.0]
    assert sent(core.on(Released("generate", 0, "first", 0), 2.5)) == [("held", 0)]


def test_it_goes_to_another_once_its_time_is_over(core: Core) -> None:
    arrive(core, "held", 1.0, "patient")
    assert sent(core.on(ReplicaMarked("g", 1, is_up=True), 2.0)) == []  # tried again, and held
    effects = core.on(TimeCame(), 3.0)
    assert sent(effects) == [("held", 1)]
    assert wakes(effects)[-1] == math.inf


def test_others_pass_it(core: Core) -> None:
    arrive(core, "held", 1.0, "patient")
    assert sent(arrive(core, "other", 1.5)) == [("other", 1)]
    assert sent(core.on(TimeCame(), 3.0)) == []  # no replica has room now
    assert sent(core.on(Released("generate", 1, "other", 0), 3.5)) == [("held", 1)]


def test_each_waits_for_its_own_time(core: Core) -> None:
    arrive(core, "long", 1.0, "most patient")
    arrive(core, "held", 1.0, "patient")
    assert sent(core.on(TimeCame(), 3.0)) == [("held", 1)]
    assert sent(core.on(Released("generate", 1, "held", 0), 4.0)) == []
    assert sent(core.on(TimeCame(), 11.0)) == [("long", 1)]


def test_a_held_request_that_is_cancelled_leaves_nothing(core: Core) -> None:
    arrive(core, "held", 1.0, "patient")
    core.on(Signalled(Signal("cancel", "held")), 1.5)
    assert core.logic_graph.holds.next_end_s == math.inf
    assert sent(core.on(TimeCame(), 3.0)) == []


def test_a_replica_that_is_lost_is_not_waited_for(core: Core) -> None:
    arrive(core, "held", 1.0, "patient")
    assert sent(core.on(ReplicaMarked("g", 0, is_up=False), 1.5)) == [("held", 1)]


def test_a_hold_ends_for_the_replica_that_is_waited_for_by_then(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def order(self: Patient, state: None, candidates: Any, now: float, draw: Any) -> Any:
        held = (Hold(0 if now < 2.0 else 1, self.limit_s),) if now else ()
        return (*held, *candidates.numbers), None

    monkeypatch.setattr(Patient, "order", order)
    monkeypatch.setattr(route_module, "find_strategy", lambda name: Patient)
    graph = Graph("g").engine("g", replicas=3)
    graph >> ops.route() >> ops.generate(engine="g")
    core = Core(plan(graph.ir, RESOLVER, {"g": 3}))
    for number in range(3):
        core.on(Opened("generate", number, Credit(1), 16), 0.0)
    assert sent(arrive(core, "zero", 0.0) + arrive(core, "one", 0.0)) == [("zero", 0), ("one", 1)]
    assert wakes(arrive(core, "held", 1.0)) == [3.0]
    assert sent(core.on(ReplicaMarked("g", 0, is_up=False), 2.0)) == []  # held for replica 1 now
    assert sent(core.on(TimeCame(), 3.0)) == [("held", 2)]


def test_a_strategy_that_holds_nothing_back_lets_nothing_wait(core: Core) -> None:
    assert sent(arrive(core, "hasty", 1.0)) == [("hasty", 1)]


def test_a_hold_needs_a_limit(core: Core, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Patient, "order", lambda *_: ((Hold(0, math.inf), 1), None))
    effects = arrive(core, "held", 1.0)
    faults = [str(one.fault.error) for one in effects if isinstance(one, Faulted)]
    assert faults == [
        "the strategy returned a Hold of inf seconds; a limit of some seconds was wanted"
    ]
