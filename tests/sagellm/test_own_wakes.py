"""Errors of a logic operator at a wake-up: its requests end, and the log names it."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import trio
from logged import logged
from own_graph import own_graph
from trio.testing import MockClock, wait_all_tasks_blocked

from sagellm import RequestFailed, Sampling
from sagellm.runtime.messages import Item
from sagellm.runtime.operator import Arrival, Emit, Step, Wake

FIVE = Sampling(max_tokens=5, ignore_eos=True)


def is_bad(item: Item) -> bool:
    return item.request_id.startswith("bad")


@dataclass(frozen=True)
class Delaying:
    """Sends each request on one second later, in the order of arrival; `woken` makes the Step of a
    wake-up that finds a bad one.
    """

    woken: Callable[[tuple[Item, ...]], Any]
    initial: tuple[Item, ...] = ()

    def on(self, state: tuple[Item, ...], happened: Any, now: float, draw: Any) -> Any:
        if isinstance(happened, Arrival):
            return Step((*state, happened.item), (), now + 1)
        if isinstance(happened, Wake):
            if any(map(is_bad, state)):
                return self.woken(state)
            return Step((), tuple(map(Emit, state)))
        return Step(state, (), now + 1 if state else None)


def raises(state: Any) -> Any:
    raise KeyError("woken")


def faulty(lines: list[dict[str, Any]]) -> set[str]:
    return {line["node"] for line in lines if line["event"] == "operator_failed"}


async def fails(session: Any, says: str, request_id: str = "bad") -> None:
    with trio.fail_after(10), pytest.raises(RequestFailed) as caught:
        await session.generate([1], sampling=FIVE, request_id=request_id)
    assert str(caught.value).startswith("policy_sort: ")
    assert says in str(caught.value)
    assert f"({__file__}:" in str(caught.value)


async def goes_on(session: Any) -> None:
    assert (await session.generate([1], sampling=FIVE)).finish_reason == "length"
    await session.idle()
    session.executor.core.ledger.check()


@pytest.mark.parametrize(
    ("woken", "says"),
    [
        (raises, "the operator raised KeyError: 'woken'"),
        (lambda state: None, "`on` returned None; a Step was wanted"),
        (lambda state: Step(()), "`on` dropped a Request from its state"),
        (lambda state: Step(None), "`on` dropped a Request from its state"),
        (lambda state: Step(state, (), math.nan), "the wake_at of its Step is NaN; a finite"),
    ],
    ids=["raises", "returns None", "drops all", "state None", "NaN"],
)
async def test_what_an_operator_holds_ends_when_it_fails_on_a_wake_up(
    woken: Any, says: str, autojump_clock: MockClock
) -> None:
    with logged() as lines:
        async with own_graph(Delaying(woken)) as session:
            await fails(session, says)
            await fails(session, says)
            await goes_on(session)
    assert faulty(lines) == {"policy_sort"}


async def test_what_was_sent_at_a_wake_up_goes_on_where_the_rest_was_dropped(
    autojump_clock: MockClock,
) -> None:
    async with own_graph(Delaying(lambda state: Step((), (Emit(state[0]),)))) as session:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(goes_on, session)
            await wait_all_tasks_blocked()
            await fails(session, "`on` dropped a Request from its state")
        await goes_on(session)


@dataclass(frozen=True)
class Keeping:
    """Holds bad requests, asks for `wake_at`, and raises for all inputs but arrivals."""

    wake_at: Any = None
    initial: int = 0

    def on(self, state: int, happened: Any, now: float, draw: Any) -> Any:
        if isinstance(happened, Arrival):
            if is_bad(happened.item):
                return Step(state + 1, (), self.wake_at)
            return Step(state, (Emit(happened.item),))
        raise KeyError(type(happened).__name__)


@pytest.mark.parametrize("wake_at", [math.nan, math.inf, "soon", True])
async def test_a_wake_up_needs_a_finite_time(wake_at: Any, autojump_clock: MockClock) -> None:
    async with own_graph(Keeping(wake_at)) as session:
        await fails(session, "a finite number was wanted")
        await goes_on(session)


async def test_what_an_operator_holds_ends_when_it_fails_on_feedback(
    autojump_clock: MockClock,
) -> None:
    async with (
        own_graph(Keeping(), subscribes=frozenset({"credit"})) as session,
        trio.open_nursery() as nursery,
    ):
        nursery.start_soon(fails, session, "the operator raised KeyError: 'CreditChanged'")
        await wait_all_tasks_blocked()
        await goes_on(session)


async def test_an_operator_that_fails_on_a_timeout_keeps_no_request(
    autojump_clock: MockClock,
) -> None:
    async with own_graph(Keeping()) as session:
        answer = await session.generate([1], sampling=FIVE, request_id="bad", timeout_s=3)
        assert answer.finish_reason == "expired"
        await goes_on(session)
