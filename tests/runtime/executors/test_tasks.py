"""The tasks executor: items, signals and credits through service operators, without an engine."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from sagellm.graphs.ir import SINK, SOURCE, Edge, Graph, Node
from sagellm.graphs.vocabulary import OpSpec
from sagellm.runtime.core.events import Returned
from sagellm.runtime.executors.tasks import ExecutorStopped, TasksExecutor
from sagellm.runtime.messages import Request, TokenEvent
from sagellm.runtime.operator import (
    Arrival,
    Context,
    Credit,
    Draw,
    Emit,
    Input,
    Service,
    Signal,
    Step,
    Wake,
)
from sagellm.runtime.plan import Plan


class Answering:
    """Answers each request with one last event once `gate` is open; notes discarded items."""

    holds = False

    def __init__(self, *, concurrency: int = 1, capacity: float = 8, is_open: bool = True) -> None:
        self.concurrency = concurrency
        self.gate = trio.Event()
        self.discarded: list[str] = []
        self.signals: list[str] = []
        self._capacity = capacity
        if is_open:
            self.gate.set()

    def capacity(self, facts: object) -> Credit:
        return Credit(requests=self._capacity)

    async def on_item(self, ctx: Context, item: Any) -> None:
        await self.gate.wait()
        if item.prompt == "raise":
            raise RuntimeError("secret")
        last = TokenEvent(request_id=item.request_id, token_ids=(1,), finish_reason="stop")
        await ctx.emit(last)

    async def on_events(self, ctx: Context, events: Any) -> None:
        raise AssertionError

    def on_signal(self, ctx: Context, signal: Signal) -> None:
        self.signals.append(signal.kind)

    def recall(self, ctx: Context, key: tuple[str, int]) -> None:
        return None

    def discard(self, ctx: Context, item: Any) -> None:
        self.discarded.append(item.request_id)


class Relay(Answering):
    """Sends requests on."""

    async def on_item(self, ctx: Context, item: Any) -> None:
        await self.gate.wait()
        await ctx.emit(item)


@asynccontextmanager
async def running(
    specs: dict[str, OpSpec] | None = None, **services: Any
) -> AsyncIterator[tuple[TasksExecutor, list[Any]]]:
    """source -> services in order -> sink; checks the ledger afterwards."""
    names = (SOURCE, *services, SINK)
    edges = tuple(Edge(a, b) for a, b in pairwise(names))
    graph = Graph("g", nodes=tuple(Node(name, name) for name in services), edges=edges)
    logic = {name: made for name, made in services.items() if not isinstance(made, Service)}
    tasks = {name: made for name, made in services.items() if name not in logic}
    plan = Plan(graph, logic, tasks, specs=specs or {})
    delivered: list[Any] = []
    executor = TasksExecutor(plan, delivered.append)
    async with trio.open_nursery() as nursery:
        await nursery.start(executor.run)
        yield executor, delivered
        await executor.idle()
        nursery.cancel_scope.cancel()
    executor.core.ledger.check()
    assert not any(executor.core.gates.accounts[name, 0].num_items for name in tasks)


def request(name: str, prompt: str = "") -> Request:
    return Request(request_id=name, prompt=prompt, prompt_token_ids=(1,))


def reasons(delivered: list[Any]) -> dict[str, str]:
    return {event.request_id: event.finish_reason for event in delivered}


async def test_a_request_goes_through_and_comes_back() -> None:
    async with running(a=Relay(), b=Answering()) as (executor, delivered):
        await executor.submit(request("r"))
        await executor.idle()
    assert reasons(delivered) == {"r": "stop"}


async def test_without_credit_the_source_waits() -> None:
    slow = Answering(capacity=1, is_open=False)
    async with running(a=slow) as (executor, _):
        await executor.submit(request("first"))
        with trio.move_on_after(0) as scope:
            await executor.submit(request("second"))
        assert scope.cancelled_caught
        assert executor.core.ledger.ended["cancelled"] == 1
        slow.gate.set()


async def test_waiting_requests_enter_when_credit_is_returned() -> None:
    slow = Answering(capacity=1, is_open=False)
    async with running(a=slow) as (executor, delivered), trio.open_nursery() as nursery:
        for number in range(3):
            nursery.start_soon(executor.submit, request(f"r{number}"))
        await wait_all_tasks_blocked()
        slow.gate.set()
    assert set(reasons(delivered).values()) == {"stop"}
    assert len(delivered) == 3


async def test_cancel_ends_what_is_being_served_and_what_waits() -> None:
    slow = Answering(is_open=False)
    async with running(a=slow) as (executor, delivered):
        for name in ("served", "waiting"):
            await executor.submit(request(name))
        await wait_all_tasks_blocked()
        for name in ("served", "waiting"):
            executor.signal(Signal("cancel", name))
    assert set(reasons(delivered).values()) == {"cancelled"}
    assert sorted(slow.discarded) == ["served", "waiting"]


async def test_a_cancel_that_overtakes_its_request_is_not_lost() -> None:
    first, second = Relay(is_open=False), Answering()
    async with running(a=first, b=second) as (executor, delivered):
        await executor.submit(request("r"))
        executor.core.register.record_signal(Signal("cancel", "r"))  # sent after `a`
        first.gate.set()
    assert reasons(delivered) == {"r": "cancelled"}


@dataclass(frozen=True)
class Keeping:
    """A logic operator that keeps every item forever."""

    initial: int = 0

    def on(self, state: int, happened: Input, now: float, draw: Draw) -> Step[int]:
        return Step(state + isinstance(happened, Arrival))


async def test_a_cancel_ends_a_request_before_an_operator_that_would_keep_it() -> None:
    relay = Relay(is_open=False)
    async with running(a=relay, b=Keeping()) as (executor, delivered):
        await executor.submit(request("r"))
        executor.core.register.record_signal(Signal("cancel", "r"))  # sent after `a`
        relay.gate.set()
    assert reasons(delivered) == {"r": "cancelled"}


async def test_a_tombstone_goes_with_its_request() -> None:
    async with running(a=Answering()) as (executor, delivered):
        await executor.submit(request("r"))
        executor.signal(Signal("cancel", "r"))
        await executor.idle()
        await executor.submit(request("r"))  # the id is free again
    assert [event.finish_reason for event in delivered] == ["cancelled", "stop"]


async def test_a_signal_for_an_unknown_request_does_nothing() -> None:
    async with running(a=Answering()) as (executor, _):
        executor.signal(Signal("cancel", "nobody"))
        await executor.submit(request("nobody"))
    assert executor.core.ledger.ended["stop"] == 1


async def test_an_operator_that_raises_fails_its_request_alone() -> None:
    faulty = Answering()
    async with running(a=faulty) as (executor, delivered):
        await executor.submit(request("bad", "raise"))
        await executor.submit(request("good"))
    assert reasons(delivered) == {"bad": "failed", "good": "stop"}
    bad = next(event for event in delivered if event.request_id == "bad")
    assert "secret" not in bad.error
    assert faulty.discarded == ["bad"]


async def test_a_request_expires(autojump_clock: trio.testing.MockClock) -> None:
    async with running(a=Answering(is_open=False)) as (executor, delivered):
        late = Request(request_id="r", prompt_token_ids=(1,), expires_s=trio.current_time() + 5)
        await executor.submit(late)
        await executor.idle()
        assert trio.current_time() == pytest.approx(late.expires_s)
    assert reasons(delivered) == {"r": "expired"}


@dataclass(frozen=True)
class Delaying:
    """A logic operator that passes each request on five seconds later."""

    initial: tuple[Request, ...] = ()

    def on(self, state: Any, happened: Input, now: float, draw: Draw) -> Step[Any]:
        match happened:
            case Arrival(item):
                return Step((*state, item), (), now + 5)
            case Wake():
                return Step((), tuple(Emit(item) for item in state))
        return Step(state, (), now + 5 if state else None)


async def test_an_operator_is_woken_when_it_asks(autojump_clock: trio.testing.MockClock) -> None:
    async with running(a=Delaying(), b=Answering()) as (executor, delivered):
        await executor.submit(request("r"))
        await executor.idle()
        assert trio.current_time() == pytest.approx(5)
    assert reasons(delivered) == {"r": "stop"}


async def test_what_a_wake_up_found_no_credit_for_comes_later(
    autojump_clock: trio.testing.MockClock,
) -> None:
    slow = Answering(capacity=1, is_open=False)
    async with running(a=Delaying(), b=slow) as (executor, delivered):
        await executor.submit(request("first"))
        await trio.sleep(6)
        await executor.submit(request("second"))
        await trio.sleep(6)
        slow.gate.set()
    assert reasons(delivered) == {"first": "stop", "second": "stop"}


@dataclass(frozen=True)
class Refusing:
    """A logic operator that fails on the request `bad`, and on a request that enters again."""

    initial: int = 0

    def on(self, state: int, happened: Input, now: float, draw: Draw) -> Step[int]:
        if isinstance(happened, Arrival) and (
            happened.item.request_id == "bad" or happened.item.epoch > 0
        ):
            raise RuntimeError("secret")
        return Step(state, (Emit(happened.item),) if isinstance(happened, Arrival) else ())


async def test_an_item_sent_at_a_wake_up_that_fails_downstream_ends_alone(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with running(a=Delaying(), b=Refusing(), c=Answering()) as (executor, delivered):
        for name in ("first", "bad", "last"):
            await executor.submit(request(name))
    assert reasons(delivered) == {"first": "stop", "bad": "failed", "last": "stop"}


async def test_a_request_that_comes_again_and_fails_on_its_way_ends() -> None:
    slow = Answering(is_open=False)
    specs = {"a": OpSpec("a", queues=True)}
    async with running(specs, a=Refusing(), b=slow) as (executor, delivered):
        await executor.submit(request("r"))
        executor.dispatch(Returned("b", request("r"), "none"))
        slow.gate.set()
    assert reasons(delivered) == {"r": "failed"}


@dataclass(frozen=True)
class Faulty:
    """A logic operator that cannot take signals."""

    initial: int = 0

    def on(self, state: int, happened: Input, now: float, draw: Draw) -> Step[int]:
        if isinstance(happened, Signal):
            raise RuntimeError("secret")
        return Step(state, (Emit(happened.item),) if isinstance(happened, Arrival) else ())


async def test_a_fault_in_a_signal_takes_nothing_down() -> None:
    async with running(a=Faulty(), b=Answering()) as (executor, delivered):
        await executor.submit(request("r"))
        executor.signal(Signal("cancel", "r"))
    assert reasons(delivered) == {"r": "cancelled"}


async def test_a_stopped_executor_ends_what_is_open_and_takes_nothing_more() -> None:
    graph = Graph("g", nodes=(Node("a", "a"),), edges=(Edge(SOURCE, "a"), Edge("a", SINK)))
    delivered: list[Any] = []
    slow = Answering(is_open=False)
    executor = TasksExecutor(Plan(graph, {}, {"a": slow}), delivered.append)
    async with trio.open_nursery() as nursery:
        await nursery.start(executor.run)
        await executor.submit(request("r"))
        nursery.cancel_scope.cancel()
    assert reasons(delivered) == {"r": "failed"}
    with pytest.raises(ExecutorStopped):
        await executor.submit(request("s"))


async def test_idle_returns_when_the_executor_dies() -> None:
    slow = Answering(is_open=False)
    graph = Graph("g", nodes=(Node("a", "a"),), edges=(Edge(SOURCE, "a"), Edge("a", SINK)))
    executor = TasksExecutor(Plan(graph, {}, {"a": slow}), lambda item: None)
    async with trio.open_nursery() as nursery:
        await nursery.start(executor.run)
        await executor.submit(request("r"))
        nursery.cancel_scope.cancel()
    await executor.idle()
    assert executor.core.register.is_empty
