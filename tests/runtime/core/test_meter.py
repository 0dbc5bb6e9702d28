"""Meters: exact counts and times that add up, on a clock that the tests control."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from itertools import pairwise
from typing import Any

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from sagellm import Graph, Sampling
from sagellm.graphs.ir import SINK, SOURCE, Edge, Node
from sagellm.graphs.ir import Graph as IR
from sagellm.runtime.core.accounting import Stopwatch
from sagellm.runtime.executors.reading import EdgeReading, OperatorReading, Reading, Window, shares
from sagellm.runtime.executors.tasks import TasksExecutor
from sagellm.runtime.feedback import Backlog, QueueChanged
from sagellm.runtime.messages import Request, TokenEvent, refusal
from sagellm.runtime.operator import (
    Arrival,
    Context,
    Credit,
    Draw,
    Emit,
    Input,
    Report,
    Service,
    Signal,
    Step,
    Terminate,
)
from sagellm.runtime.plan import Plan

NULL = {
    f"{engine}.{option}": value
    for engine in ("p", "d")
    for option, value in {"device": "null", "num_blocks": 2048, "kv_bytes_per_s": 1e8}.items()
}


class Timed:
    """Holds each item for a second, then sends it on, or fails where the prompt says so."""

    concurrency = 1
    holds = False

    def __init__(self, *, capacity: float = 8, concurrency: int = 1) -> None:
        self.concurrency = concurrency
        self._capacity = capacity

    def capacity(self, facts: object) -> Credit:
        return Credit(requests=self._capacity)

    async def on_item(self, ctx: Context, item: Any) -> None:
        await trio.sleep(1)
        if item.prompt == "raise":
            raise RuntimeError
        await ctx.emit(item)

    async def on_events(self, ctx: Context, events: Any) -> None:
        raise AssertionError

    def on_signal(self, ctx: Context, signal: Signal) -> None:
        """Do nothing: no engine holds a part of the item."""

    def recall(self, ctx: Context, key: tuple[str, int]) -> None:
        return None

    def discard(self, ctx: Context, item: Any) -> None:
        """Do nothing: an item holds nothing."""


class Answering(Timed):
    async def on_item(self, ctx: Context, item: Any) -> None:
        await trio.sleep(1)
        await ctx.emit(TokenEvent(request_id=item.request_id, token_ids=(1,), finish_reason="stop"))


class Refusing(Timed):
    async def on_item(self, ctx: Context, item: Any) -> None:
        await ctx.terminate(refusal(item, "refused", now=ctx.now()))


class Pass:
    """Logic that passes all items, reports a queue as long as the prompt says, or fails."""

    initial = None

    def on(self, state: None, happened: Input, now: float, draw: Draw) -> Step[None]:
        match happened:
            case Arrival(item=Request(prompt="raise")):
                raise RuntimeError
            case Arrival(item=Request(prompt="failed") as request):
                return Step(None, (Terminate(refusal(request, "failed", now=now)),))
            case Arrival(item=Request(prompt="queue" | "empty") as request):
                waiting = Backlog(num_requests=3 if request.prompt == "queue" else 0)
                return Step(None, (Report(QueueChanged(backlog=waiting)), Emit(request)))
            case Arrival(item=item):
                return Step(None, (Emit(item),))
        return Step(None)


@asynccontextmanager
async def running(**operators: Any) -> AsyncIterator[TasksExecutor]:
    """source -> operators in order -> sink."""
    names = (SOURCE, *operators, SINK)
    edges = tuple(Edge(a, b) for a, b in pairwise(names))
    graph = IR("g", nodes=tuple(Node(name, f"op_{name}") for name in operators), edges=edges)
    logic = {name: made for name, made in operators.items() if not isinstance(made, Service)}
    services = {name: made for name, made in operators.items() if name not in logic}
    plan = Plan(graph, logic, services)
    executor = TasksExecutor(plan, lambda item: None)
    async with trio.open_nursery() as nursery:
        await nursery.start(executor.run)
        yield executor
        await executor.idle()
        nursery.cancel_scope.cancel()


def request(name: str, prompt: str = "") -> Request:
    return Request(request_id=name, prompt=prompt, prompt_token_ids=(1,))


def operator(reading: Reading, name: str) -> OperatorReading:
    return next(one for one in reading.operators if one.node == name)


def edges(reading: Reading) -> dict[str, int]:
    return {f"{e.source}.{e.outlet}->{e.target}": e.num_items for e in reading.edges}


async def test_every_item_is_counted_where_it_passed(autojump_clock: MockClock) -> None:
    async with running(a=Pass(), b=Timed(), c=Pass(), d=Answering(), e=Pass()) as executor:
        for number in range(5):
            await executor.submit(request(f"r{number}"))
        await executor.idle()
        reading = executor.reading()
    assert [(one.num_in, one.num_out) for one in reading.operators] == [(5, 5)] * 5
    assert edges(reading) == {
        "source.out->a": 5, "a.out->b": 5, "b.out->c": 5, "c.out->d": 5, "d.out->e": 5,
        "e.out->sink": 5, "a.terminal->sink": 0, "b.terminal->sink": 0, "c.terminal->sink": 0,
        "d.terminal->sink": 0, "e.terminal->sink": 0,
    }  # fmt: skip


async def test_what_was_undone_is_not_counted(autojump_clock: MockClock) -> None:
    async with running(a=Pass(), b=Answering(capacity=1)) as executor:
        async with trio.open_nursery() as nursery:
            for number in range(4):
                nursery.start_soon(executor.submit, request(f"r{number}"))
        await executor.idle()
        reading = executor.reading()
    assert operator(reading, "a").num_in == operator(reading, "a").num_out == 4
    assert edges(reading)["a.out->b"] == operator(reading, "b").num_in == 4


async def test_ends_at_an_operator_leave_by_its_terminal_outlet(autojump_clock: MockClock) -> None:
    async with running(a=Pass(), b=Refusing()) as executor:
        await executor.submit(request("r"))
        await executor.submit(request("f", "failed"))
        await executor.idle()
        reading = executor.reading()
    assert edges(reading)["a.terminal->sink"] == 1
    assert edges(reading)["b.terminal->sink"] == 1
    assert [one.num_out for one in reading.operators] == [2, 1]


async def test_faults_are_counted_where_they_happened(autojump_clock: MockClock) -> None:
    async with running(a=Pass(), b=Timed(), c=Answering()) as executor:
        await executor.submit(request("f", "failed"))  # a user's function
        await executor.submit(request("l", "raise"))  # in the logic
        await executor.idle()
        assert [one.num_errors for one in executor.reading().operators] == [2, 0, 0]
    async with running(b=Timed(), c=Answering()) as executor:
        await executor.submit(request("s", "raise"))
        await executor.idle()
        assert [one.num_errors for one in executor.reading().operators] == [1, 0]
        assert executor.reading().operators[0].num_in_flight == 0


async def test_a_service_is_busy_while_it_holds_an_item(autojump_clock: MockClock) -> None:
    async with running(a=Answering()) as executor:
        await trio.sleep(3)
        await executor.submit(request("r"))
        await executor.idle()
        await trio.sleep(4)
        one = operator(executor.reading(), "a")
    assert (one.busy_s, one.backpressured_s) == (pytest.approx(1), 0)
    assert one.process_s == pytest.approx(1)


async def test_calls_overlap_and_busy_time_does_not(autojump_clock: MockClock) -> None:
    async with running(a=Answering(concurrency=4)) as executor:
        for number in range(4):
            await executor.submit(request(f"r{number}"))
        await executor.idle()
        one = operator(executor.reading(), "a")
    assert one.busy_s == pytest.approx(1)
    assert one.process_s == pytest.approx(4)


async def test_who_waits_for_credit_is_backpressured(autojump_clock: MockClock) -> None:
    """c takes one item at a time; finished items of a wait, and so does the operator between."""
    fast, slow = Timed(concurrency=4), Answering(capacity=1)
    async with running(a=fast, b=Pass(), c=slow) as executor:
        for number in range(4):
            await executor.submit(request(f"r{number}"))
        await executor.idle()
        reading = executor.reading()
    assert operator(reading, "a").busy_s == pytest.approx(1)
    assert operator(reading, "a").backpressured_s == pytest.approx(3)
    assert operator(reading, "b").backpressured_s == pytest.approx(3)
    assert operator(reading, "c").busy_s == pytest.approx(4)
    assert operator(reading, "c").backpressured_s == 0


async def test_the_source_waiting_backpressures_what_it_feeds(autojump_clock: MockClock) -> None:
    async with running(a=Pass(), b=Answering(capacity=1)) as executor:
        async with trio.open_nursery() as nursery:
            for number in range(3):
                nursery.start_soon(executor.submit, request(f"r{number}"))
        await executor.idle()
        reading = executor.reading()
    assert operator(reading, "a").backpressured_s == pytest.approx(2)


async def test_a_cancelled_wait_ends_the_backpressure(autojump_clock: MockClock) -> None:
    async with running(a=Pass(), b=Answering(capacity=1)) as executor:
        await executor.submit(request("r0"))
        with trio.move_on_after(0.5):
            await executor.submit(request("r1"))
        await trio.sleep(5)
        assert operator(executor.reading(), "a").backpressured_s == pytest.approx(0.5)


async def test_a_queue_that_was_told_is_shown_and_blocks(autojump_clock: MockClock) -> None:
    async with running(a=Pass(), b=Answering()) as executor:
        assert operator(executor.reading(), "a").queue_depth == 0
        await executor.submit(request("r", "queue"))
        assert operator(executor.reading(), "a").queue_depth == 3
        await trio.sleep(2)
        await executor.submit(request("s", "empty"))
        await trio.sleep(2)
        one = operator(executor.reading(), "a")
    assert (one.queue_depth, one.backpressured_s) == (0, pytest.approx(2))


async def test_queue_and_credit_before_a_service(autojump_clock: MockClock) -> None:
    async with running(a=Answering(capacity=5)) as executor:
        for number in range(3):
            await executor.submit(request(f"r{number}"))
        await wait_all_tasks_blocked()
        one = operator(executor.reading(), "a")
        assert (one.num_in_flight, one.queue_depth, one.queue_capacity) == (3, 2, 5)


async def test_a_reading_changes_nothing(autojump_clock: MockClock) -> None:
    async with running(a=Answering()) as executor:
        await executor.submit(request("r"))
        assert executor.reading() == executor.reading()


def counts_of(reading: Reading) -> list[tuple[int, ...]]:
    return [(one.num_in, one.num_out, one.num_errors) for one in reading.operators]


def times_of(reading: Reading) -> list[float]:
    times = [(one.busy_s, one.backpressured_s, one.process_s) for one in reading.operators]
    return [time for each in times for time in each]


@pytest.mark.parametrize("graph", ["pd_many", "joint"])
async def test_shipped_graphs_balance_and_equal_runs_read_equal(
    graph: str, autojump_clock: MockClock
) -> None:
    async def run() -> Reading:
        loaded = Graph.load(graph)
        known = {
            key: value for key, value in NULL.items() if key.split(".")[0] in loaded.ir.engines
        }
        known |= {f"{name}.device": "null" for name in loaded.ir.engines}
        async with loaded.open(set=known) as session:
            started_s = trio.current_time()
            async with trio.open_nursery() as nursery:
                for number in range(100):
                    sampling = Sampling(max_tokens=1 + number % 7, ignore_eos=True)
                    prompt = [1] * (1 + number * 3)
                    nursery.start_soon(lambda p=prompt, s=sampling: session.generate(p, sampling=s))
                    await trio.sleep(1e-6)  # trio starts tasks in any order
            await session.idle()
            reading = session.executor.reading()
            elapsed_s = trio.current_time() - started_s
        for one in reading.operators:
            assert one.num_in_flight == 0
            assert one.busy_s + one.backpressured_s <= elapsed_s + 1e-9
        sort = operator(reading, "sort")
        assert (sort.num_in, sort.queue_capacity) == (100, 4096)
        assert sort.backpressured_s > 0
        return reading

    first, second = await run(), await run()
    assert first.edges == second.edges
    if graph == "joint":  # trio chooses which replica wakes first
        assert counts_of(first) == counts_of(second)
        assert times_of(first) == pytest.approx(times_of(second))


async def test_replicas_add_up_to_their_edges(autojump_clock: MockClock) -> None:
    async with Graph.load("pd_many").open(set=NULL) as session:
        async with trio.open_nursery() as nursery:
            for number in range(40):  # no two prompts share a prefix
                nursery.start_soon(session.generate, [number] * 100)
        reading = session.executor.reading()
    came = {edge.target: 0 for edge in reading.edges}
    for edge in reading.edges:
        came[edge.target] += edge.num_items
    replicas = [one for one in reading.operators if one.node == "prefill"]
    assert len(replicas) == 2
    assert all(one.num_in for one in replicas)
    assert sum(one.num_in for one in replicas) == came["prefill"] == 40


def test_a_stopwatch_runs_while_anything_is_the_case() -> None:
    now = [0.0]
    watch = Stopwatch(lambda: now[0])
    for at, act in ((1, watch.enter), (2, watch.enter), (4, watch.leave), (5, watch.leave)):
        now[0] = at
        act()
    now[0] = 9.0
    assert watch.seconds == 4
    watch.enter()
    now[0] = 10.0
    assert watch.seconds == 5


def reading_at(at_s: float, busy_s: float, blocked_s: float) -> Reading:
    one = OperatorReading("a", "op", 0, 0, 0, 0, 0, 0, None, busy_s, busy_s, blocked_s)
    return Reading(at_s, (one,), (EdgeReading("source", "out", "a", 0),))


def test_shares_add_up_to_one() -> None:
    before, after = reading_at(0, 0, 0), reading_at(10, 7, 9)
    found = shares(before.operators[0], after.operators[0], 10)
    assert found == (0.7, 0.0, pytest.approx(0.3))
    assert shares(before.operators[0], after.operators[0], 0) == (0, 1, 0)


def test_a_window_forgets_what_is_older_than_its_span() -> None:
    window = Window(10)
    for second in range(31):
        window.add(reading_at(second, 0.5 * second if second < 20 else 10, 0))
    assert window.shares(reading_at(30, 10, 0))["a", 0] == (0, 1, 0)
    assert window.shares(reading_at(31, 10.55, 0))["a", 0].busy == pytest.approx(0.05)
