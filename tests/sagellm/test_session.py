"""A session over a null engine: what callers see of their requests."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
import trio
from trio.testing import MockClock

from sagellm import Answer, Graph, Request, Sampling, TokenEvent, ops
from sagellm.session import RequestError, Session, gather


def joint(*after: Any, before: tuple[Any, ...] = (), **engine: Any) -> Graph:
    graph = Graph("g").engine("g", device="null", **engine)
    for operator in (*before, ops.generate(engine="g"), *after):
        graph >> operator
    return graph


@asynccontextmanager
async def opened(graph: Graph) -> AsyncIterator[Session]:
    """The session; afterwards the books balance and no block is leased."""
    async with graph.open() as session:
        yield session
        await session.executor.idle()
        session.executor.ledger.check()
        assert all(
            load.num_leased_blocks == 0
            for pool in session.statistics().engines.values()
            for load in pool
        )


LONG = Sampling(max_tokens=50, ignore_eos=True)


async def test_a_stream_gives_every_token_in_order(autojump_clock: MockClock) -> None:
    async with opened(joint()) as session:
        events = [event async for event in session.stream([1, 2, 3], sampling=LONG)]
    assert [event.position for event in events] == list(range(50))
    assert [event.is_last for event in events] == [False] * 49 + [True]
    assert events[-1].finish_reason == "length"


async def test_streamed_is_whole(autojump_clock: MockClock) -> None:
    sampling = Sampling(max_tokens=20, seed=3, temperature=1.0, ignore_eos=True)
    async with opened(joint()) as session:
        events = [event async for event in session.stream([1], sampling=sampling)]
        answer = await session.generate([1], sampling=sampling)
    assert gather(events).token_ids == answer.token_ids


async def test_n_choices_differ_and_come_in_order(autojump_clock: MockClock) -> None:
    sampling = Sampling(max_tokens=8, n=3, temperature=1.0, ignore_eos=True)
    async with opened(joint()) as session:
        answers = await session.generate_all([1], sampling=sampling)
    assert [answer.choice for answer in answers] == [0, 1, 2]
    assert len({answer.token_ids for answer in answers}) == 3


async def test_leaving_a_stream_cancels_it(autojump_clock: MockClock) -> None:
    async with opened(joint()) as session:
        async with session.stream([1], sampling=LONG) as stream:
            async for _ in stream:
                break
        await session.executor.idle()
        assert session.executor.ledger.ended == {"cancelled": 1}


async def test_losing_a_stream_cancels_it(autojump_clock: MockClock) -> None:
    async with opened(joint()) as session:
        stream = session.stream([1], sampling=LONG)
        await stream.__anext__()
        del stream
        await session.executor.idle()
        assert session.executor.ledger.ended == {"cancelled": 1}


async def test_cancel_ends_a_stream_with_its_reason(autojump_clock: MockClock) -> None:
    async with opened(joint()) as session:
        events = []
        async for event in session.stream([1], sampling=LONG, request_id="r"):
            events.append(event)
            session.cancel("r")
    assert events[-1].finish_reason == "cancelled"
    assert len(events) < 5


async def test_a_request_that_takes_too_long_expires(autojump_clock: MockClock) -> None:
    async with opened(joint()) as session:
        answer = await session.generate([1], sampling=LONG, timeout_s=0.1)
        assert answer.finish_reason == "expired"
        assert trio.current_time() == pytest.approx(0.1, abs=0.02)


async def test_leaving_a_session_ends_what_runs(autojump_clock: MockClock) -> None:
    async with joint().open() as session:
        stream = session.stream([1], sampling=LONG)
        await stream.__anext__()
    session.executor.ledger.check()
    assert session.executor.ledger.ended == {"cancelled": 1}


async def test_an_error_in_the_block_comes_out_as_it_is(autojump_clock: MockClock) -> None:
    with pytest.raises(KeyError):
        async with joint().open():
            raise KeyError("mine")


async def test_one_id_runs_once(autojump_clock: MockClock) -> None:
    async with opened(joint()) as session:
        first = session.stream([1], sampling=LONG, request_id="r")
        await first.__anext__()
        with pytest.raises(RequestError, match="running already"):
            await session.generate([1], request_id="r")
        await first.aclose()


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"prioritty": 1}, "did you mean 'priority'"),
        ({"sampling": Sampling(temperature=float("nan"))}, "temperature is nan"),
        ({"sampling": Sampling(top_p=0)}, "top_p is 0"),
        ({"sampling": Sampling(max_tokens=0)}, "max_tokens is 0"),
        ({"sampling": Sampling(n=0)}, "n is 0"),
        ({"sampling": Sampling(stop=("",))}, "stop string is empty"),
        ({"sampling": Sampling(min_tokens=9, max_tokens=8)}, "min_tokens is larger"),
    ],
)
async def test_bad_fields_are_refused_before_they_enter(
    fields: dict[str, Any], says: str, autojump_clock: MockClock
) -> None:
    async with opened(joint()) as session:
        with pytest.raises(RequestError, match=says):
            session.stream([1], **fields)
        assert session.executor.ledger.num_accepted == 0


async def test_an_empty_prompt_is_refused(autojump_clock: MockClock) -> None:
    async with opened(joint()) as session:
        with pytest.raises(RequestError, match="empty"):
            session.stream([])


async def test_a_prompt_too_long_for_the_model_is_refused(autojump_clock: MockClock) -> None:
    async with opened(joint(max_model_len=64)) as session:
        answer = await session.generate([1] * 65)
    assert answer.finish_reason == "refused"
    assert "64" in (answer.error or "")


# ---- a user's functions in the graph ---------------------------------------------------------


def only_even(event: TokenEvent) -> bool:
    return event.position % 2 == 0


def name_it(answer: Answer) -> str:
    return f"{len(answer.token_ids)} tokens"


def broken(item: Any) -> str:
    raise RuntimeError("private")


def twice(request: Request) -> list[Request]:
    return [request, request]


async def name_slowly(answer: Answer) -> str:
    await trio.sleep(1)
    return name_it(answer)


@pytest.mark.parametrize("function", [name_it, name_slowly])
async def test_a_function_reads_whole_answers(function: Any, autojump_clock: MockClock) -> None:
    async with opened(joint(ops.collect(), ops.map(function))) as session:
        answer = await session.generate([1], sampling=LONG)
    assert answer.value == "50 tokens"


async def test_a_filter_leaves_tokens_out_and_the_request_still_ends(
    autojump_clock: MockClock,
) -> None:
    async with opened(joint(ops.filter(only_even))) as session:
        answer = await session.generate([1], sampling=LONG)
    assert len(answer.token_ids) == 25
    assert answer.finish_reason == "length"


async def test_a_function_that_raises_mid_stream_stops_the_engine(
    autojump_clock: MockClock,
) -> None:
    async with opened(joint(ops.map(broken))) as session:
        answer = await session.generate([1], sampling=LONG)
        assert answer.finish_reason == "failed"
        assert "private" not in (answer.error or "")
        await trio.sleep(5)
        (load,) = session.statistics().engines["g"]
        assert (load.num_running, load.num_leased_blocks) == (0, 0)
        assert load.num_steps < 10


async def test_a_request_can_become_several(autojump_clock: MockClock) -> None:
    async with opened(joint(before=(ops.flat_map(twice),))) as session:
        answers = await session.generate_all([1], sampling=LONG)
    assert [answer.choice for answer in answers] == [0, 1]


def add_a_word(request: Request) -> str:
    return request.prompt + "!"


@pytest.mark.parametrize("prompt", ["abc", [97, 98, 99]])
async def test_a_function_rewrites_text_and_token_prompts(
    prompt: Any, autojump_clock: MockClock
) -> None:
    graph = joint(before=(ops.map(add_a_word),), model="null")
    async with opened(graph) as session:
        answer = await session.generate(prompt, sampling=LONG)
    assert answer.num_prompt_tokens == 4


async def test_a_request_that_a_function_ended_knows_when_it_began(
    autojump_clock: MockClock,
) -> None:
    def fail_at_five(event: TokenEvent) -> str:
        return event.text if event.position < 5 else broken(event)

    async with opened(joint(ops.map(fail_at_five))) as session:
        await trio.sleep(3)
        answer = await session.generate([1], sampling=LONG)
    assert answer.stamps.arrived_s == 3
    assert len(answer.token_ids) == 5
