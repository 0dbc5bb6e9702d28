"""A logic operator asks for another number of replicas: an effect, whose end is feedback."""

from dataclasses import dataclass
from typing import Any

import pytest
from own_graph import NULL, own_graph
from trio.testing import MockClock

from sagellm import Graph, Sampling, ops
from sagellm.builder import RESOLVER
from sagellm.runtime.core.core import Core
from sagellm.runtime.core.effects import ScaleTo, Send, WakeAt
from sagellm.runtime.core.events import Arrived, Opened, Reported, TimeCame
from sagellm.runtime.feedback import ScaleEnded
from sagellm.runtime.messages import Request
from sagellm.runtime.operator import Arrival, Credit, Draw, Emit, Input, ScaleEngine, Step
from sagellm.runtime.plan import plan
from sagellm.session import RequestFailed


def autoscaled(**options: Any) -> Core:
    bounds = {"g": {"max": 3, "requests_per_s": 1.0}}
    graph = Graph("g").engine("g", **NULL)
    shaped = graph >> ops.autoscale(engines=bounds, interval_s=1.0, **options)
    shaped = shaped >> ops.policy_sort() >> ops.route() >> ops.generate(engine="g")
    return Core(plan(shaped.ir, RESOLVER, {"g": 1}))


def loaded(core: Core) -> list[Any]:
    """The effects of opening the engine and of five requests, except sent ones."""
    found = core.on(Opened("generate", 0, Credit(64), 16), 0.0)
    for number in range(5):
        request = Request(request_id=f"r{number}", prompt_token_ids=(1,) * 8)
        found += core.on(Arrived(1, (request,)), 0.1 * number)
    found += core.on(TimeCame(), 1.0)
    return [effect for effect in found if not isinstance(effect, Send)]


def test_a_decision_is_an_effect() -> None:
    core = autoscaled()
    assert loaded(core) == [WakeAt(1.0), ScaleTo("g", 3, 1, "demand"), WakeAt(2.0)]
    scaling = core.meter.scaling("g")
    assert (scaling.num_wanted, scaling.changes, scaling.num_failed) == (3, {"demand": 1}, 0)


def test_the_end_of_a_change_reaches_the_operator_and_the_meter() -> None:
    core = autoscaled()
    loaded(core)
    state = core.logic_graph.cells["autoscale"].state
    assert state.scalings["g"].pending_s == 1.0
    core.on(Reported(ScaleEnded(node="generate", engine="g", error="no memory")), 1.5)
    state = core.logic_graph.cells["autoscale"].state
    assert (state.scalings["g"].pending_s, state.scalings["g"].retry_at_s) == (None, 31.5)
    assert core.meter.scaling("g").num_failed == 1


@dataclass
class Asking:
    """Asks for `count` replicas with every request."""

    count: Any
    initial = 0

    def on(self, state: int, happened: Input, now: float, draw: Draw) -> Step[int]:
        if isinstance(happened, Arrival):
            asked = ScaleEngine("g", self.count, 1, "own")
            return Step(state + 1, (asked, Emit(happened.item)))
        return Step(state)


@pytest.mark.parametrize(
    ("count", "shown"),
    [(0, "its ScaleEngine has 0;"), ("two", "its ScaleEngine has a value of type str;")],
)
async def test_a_wrong_number_ends_the_request(
    count: Any, shown: str, autojump_clock: MockClock
) -> None:
    async with own_graph(Asking(count)) as session:
        with pytest.raises(RequestFailed, match=shown):
            await session.generate("x", sampling=Sampling(max_tokens=1))


async def test_an_executor_with_fixed_replicas_says_so_and_serves(
    autojump_clock: MockClock,
) -> None:
    async with own_graph(Asking(5)) as session:
        answer = await session.generate("x", sampling=Sampling(max_tokens=2, ignore_eos=True))
        assert len(answer.token_ids) == 2
        assert session.executor.core.meter.scaling("g").num_failed == 1
        assert len(session.executor.engines["g"]) == 1
