"""Streams over a null engine: reading in batches, readers that do not read, who is told what."""

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from sagellm import Graph, Sampling, TokenEvent, ops
from sagellm.runtime.messages import Forked, Item, Request
from sagellm.session import Encoded, RequestError, Session
from sagellm.session.models import Models

LONG = Sampling(max_tokens=50, ignore_eos=True)
STEP_S = 0.01


def joint(*after: Any, before: tuple[Any, ...] = ()) -> Graph:
    graph = Graph("g").engine("g", device="null", decode_step_s=STEP_S)
    for operator in (*before, ops.generate(engine="g"), *after):
        graph >> operator
    return graph


@asynccontextmanager
async def opened(graph: Graph) -> AsyncIterator[Session]:
    """The session; afterwards the books balance and no block is leased."""
    async with graph.open() as session:
        yield session
        await session.idle()
        session.executor.core.ledger.check()
        assert num_leased(session) == 0


def num_leased(session: Session) -> int:
    pools = session.statistics().engines.values()
    return sum(load.num_leased_blocks for pool in pools for load in pool)


class Notes:
    """An observer that keeps what it is told."""

    def __init__(self) -> None:
        self.requests: list[Request] = []
        self.items: list[Item | Forked] = []

    def submitted(self, requests: Sequence[Request]) -> None:
        self.requests += requests

    def delivered(self, item: Item | Forked) -> None:
        self.items.append(item)


# ---- take --------------------------------------------------------------------------------------


async def test_what_one_step_yields_is_taken_together(autojump_clock: MockClock) -> None:
    many = Sampling(max_tokens=5, n=3, ignore_eos=True)
    async with opened(joint()) as session, session.stream([1], sampling=many) as stream:
        taken = [await stream.take() for _ in range(6)]
        assert await stream.take() == ()
    first, *middle, last = (len(batch) for batch in taken)
    assert middle == [3, 3, 3, 3]
    assert first + last == 3  # a step may be under way before all choices have come
    assert [sorted(event.choice for event in batch) for batch in taken[1:5]] == [[0, 1, 2]] * 4


async def test_take_returns_all_that_waits(autojump_clock: MockClock) -> None:
    async with opened(joint()) as session, session.stream([1], sampling=LONG) as stream:
        await trio.sleep(5.5 * STEP_S)
        assert [event.position for event in await stream.take()] == [0, 1, 2, 3, 4]
        assert [event.position for event in await stream.take()] == [5]
        assert (await stream.__anext__()).position == 6


class Steps(trio.abc.Instrument):
    """Counts how often one task has run."""

    def __init__(self, task: trio.lowlevel.Task) -> None:
        self.num_steps = 0
        self._task = task

    def before_task_step(self, task: trio.lowlevel.Task) -> None:
        self.num_steps += task is self._task


async def test_who_wants_the_whole_answer_is_not_woken_for_each_token(
    autojump_clock: MockClock,
) -> None:
    async with opened(joint()) as session:
        steps = Steps(trio.lowlevel.current_task())
        trio.lowlevel.add_instrument(steps)
        answer = await session.generate([1], sampling=Sampling(max_tokens=200, ignore_eos=True))
        trio.lowlevel.remove_instrument(steps)
    assert len(answer.token_ids) == 200
    assert steps.num_steps < 20


async def test_a_cancelled_take_loses_nothing(autojump_clock: MockClock) -> None:
    async with opened(joint()) as session, session.stream([1], sampling=LONG) as stream:
        with trio.move_on_after(STEP_S / 2) as scope:
            await stream.take()
        assert scope.cancelled_caught
        assert [event.position for event in await stream.take()] == [0]


# ---- encoded prompts ---------------------------------------------------------------------------


class NoTokenizer:
    """Whoever asks it has encoded, or decoded, again."""


async def test_an_encoded_prompt_is_neither_encoded_nor_decoded(autojump_clock: MockClock) -> None:
    notes = Notes()
    async with opened(joint()) as session:
        blind = replace(session.models.default, tokenizer=NoTokenizer())  # type: ignore[arg-type]
        session.models = Models((blind,))
        session.observers.append(notes)
        await session.generate(Encoded("hello", (5, 6)), sampling=LONG)
    assert [(request.prompt, request.prompt_token_ids) for request in notes.requests] == [
        ("hello", (5, 6))
    ]


@pytest.mark.parametrize(
    ("prompt", "says"),
    [
        (Encoded("a", ()), "empty"),
        (Encoded("a", (-1,)), "-1"),
        (Encoded("a", (1 << 63,)), "token id"),
        (Encoded("\ud800", (1,)), "Unicode"),
    ],
)
async def test_an_encoded_prompt_is_checked(
    prompt: Encoded, says: str, autojump_clock: MockClock
) -> None:
    async with opened(joint()) as session:
        with pytest.raises(RequestError, match=says):
            session.stream(prompt)


# ---- readers that do not read ------------------------------------------------------------------


def lengthy(event: TokenEvent) -> str:
    return "ä" * 500  # 1000 bytes


@pytest.mark.parametrize(
    ("limits", "num_read"), [({"limit_tokens": 8}, 9), ({"limit_bytes": 8 * 1000}, 9)]
)
async def test_a_reader_that_does_not_read_is_cut_off(
    limits: dict[str, int], num_read: int, autojump_clock: MockClock
) -> None:
    async with opened(joint(ops.map(lengthy))) as session:
        stream = await session.stream([1], sampling=LONG, **limits).__aenter__()
        await trio.sleep((num_read + 0.5) * STEP_S)
        assert num_leased(session) > 0
        await trio.sleep(STEP_S)
        assert num_leased(session) == 0
        events = [event async for event in stream]
    assert [event.position for event in events] == [*range(num_read), num_read]
    assert (events[-1].finish_reason, events[-1].code) == ("cancelled", "slow_reader")
    assert {event.code for event in events[:-1]} == {""}


async def test_every_choice_of_a_slow_reader_ends(autojump_clock: MockClock) -> None:
    many = Sampling(max_tokens=50, n=3, ignore_eos=True)
    async with (
        opened(joint()) as session,
        session.stream([1], sampling=many, limit_tokens=7) as stream,
    ):
        await trio.sleep(1)
        events = await stream.take()
        assert await stream.take() == ()
    ends = [(event.finish_reason, event.code) for event in events if event.is_last]
    assert ends == [("cancelled", "slow_reader")] * 3


async def test_a_reader_that_reads_is_left_alone(autojump_clock: MockClock) -> None:
    async with opened(joint(ops.map(lengthy))) as session:
        stream = session.stream([1], sampling=LONG, limit_tokens=2, limit_bytes=2000)
        events = [event async for event in stream]
    assert events[-1].finish_reason == "length"
    assert len(events) == 50


async def test_others_do_not_wait_for_a_slow_reader(autojump_clock: MockClock) -> None:
    async with opened(joint()) as session, session.stream([1], sampling=LONG, limit_tokens=4):
        answer = await session.generate([1], sampling=LONG)
    assert answer.finish_reason == "length"
    assert trio.current_time() == pytest.approx(51 * STEP_S, abs=STEP_S)


async def test_the_end_of_an_answer_is_no_overrun(autojump_clock: MockClock) -> None:
    short = Sampling(max_tokens=3, ignore_eos=True)
    async with (
        opened(joint()) as session,
        session.stream([1], sampling=short, limit_tokens=2) as stream,
    ):
        await trio.sleep(1)
        events = await stream.take()
    assert events[-1].finish_reason == "length"


# ---- who is told -------------------------------------------------------------------------------


async def test_observers_see_what_enters_and_what_leaves(autojump_clock: MockClock) -> None:
    notes = Notes()
    many = Sampling(max_tokens=4, n=2, ignore_eos=True)
    async with opened(joint()) as session:
        session.observers.append(notes)
        await session.generate_all(
            [1], sampling=many, request_id="r", salt="s", trace="00-1-2-01", tags={"a": "b"}
        )
        with pytest.raises(RequestError):
            session.stream([])
    assert [request.key for request in notes.requests] == [("r", 0), ("r", 1)]
    assert {request.salt for request in notes.requests} == {"s"}
    assert notes.requests[0].tags == {"a": "b", "traceparent": "00-1-2-01"}
    assert len(notes.items) == 8


async def test_observers_see_the_end_of_a_request_whose_reader_left(
    autojump_clock: MockClock,
) -> None:
    notes = Notes()
    async with opened(joint()) as session:
        session.observers.append(notes)
        async with session.stream([1], sampling=LONG) as stream:
            await stream.take()
        await session.idle()
    assert getattr(notes.items[-1], "finish_reason", None) == "cancelled"


async def test_a_broken_observer_breaks_nothing(autojump_clock: MockClock) -> None:
    notes = Notes()
    async with opened(joint()) as session:
        session.observers += [object(), notes]  # type: ignore[list-item]
        answer = await session.generate([1], sampling=LONG)
    assert answer.finish_reason == "length"
    assert len(notes.items) == 50


async def test_a_closing_session_says_so(autojump_clock: MockClock) -> None:
    async with joint().open() as session:
        stream = session.stream([1], sampling=LONG)
        await stream.take()
    events = await stream.take()
    assert (events[-1].finish_reason, events[-1].code) == ("cancelled", "shutting_down")


async def test_cancel_says_whether_the_request_was_known(autojump_clock: MockClock) -> None:
    async with opened(joint()) as session:
        stream = session.stream([1], sampling=LONG, request_id="r")
        await stream.take()
        assert session.cancel("r")
        assert not session.cancel("other")
        events = [event async for event in stream]
    assert (events[-1].finish_reason, events[-1].code) == ("cancelled", "")


async def test_what_ends_by_itself_is_not_cancelled_as_well(
    autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with opened(joint()) as session:
        signals: list[Any] = []
        monkeypatch.setattr(session.executor, "signal", signals.append)
        await session.generate([1], sampling=LONG)
        await wait_all_tasks_blocked()
    assert signals == []


# ---- ids that are used again -------------------------------------------------------------------


async def test_an_id_in_use_again_is_not_taken_for_its_last_user(
    autojump_clock: MockClock,
) -> None:
    """Three requests end in one step, and a slow map lets their last events pass one by one."""

    async def slow_at_the_end(event: TokenEvent) -> TokenEvent:
        await trio.sleep(event.is_last)
        return event

    async with opened(joint(ops.map(slow_at_the_end, concurrency=1))) as session:

        async def ask(request_id: str, num_tokens: int) -> None:
            sampling = Sampling(max_tokens=num_tokens, ignore_eos=True)
            await session.generate([1], sampling=sampling, request_id=request_id)

        async with trio.open_nursery() as nursery:
            for request_id in ("s", "t"):
                nursery.start_soon(ask, request_id, 1)
            await ask("r", 2)
            async with session.stream([1], sampling=LONG, request_id="r") as again:
                await again.take()
                assert num_leased(session) > 0
            await trio.sleep(2 * STEP_S)
            assert num_leased(session) == 0
