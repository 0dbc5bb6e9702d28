"""A session over a null engine: what callers see of their requests."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from sagellm import (
    Answer,
    Graph,
    Request,
    RequestFailed,
    RequestRefused,
    Sampling,
    TokenEvent,
    ops,
)
from sagellm.runtime.core.inputs import InputQueue
from sagellm.runtime.feedback import Feedback, LoadReported
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
        session.executor.core.ledger.check()
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


@pytest.mark.parametrize(
    ("before", "is_recorded", "is_reported"),
    [((), False, False), ((ops.route(),), False, True), ((), True, True)],
)
async def test_load_is_reported_where_an_operator_or_a_log_wants_it(
    before: tuple[Any, ...],
    is_recorded: bool,
    is_reported: bool,
    autojump_clock: MockClock,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    reports: list[Feedback] = []
    monkeypatch.setattr(InputQueue, "report", lambda self, feedback: reports.append(feedback))
    log = tmp_path / "log" if is_recorded else None
    async with joint(before=before).open(decisions=log) as session:
        await session.generate("hello", sampling=LONG)
    assert any(isinstance(report, LoadReported) for report in reports) is is_reported


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
        assert session.executor.core.ledger.ended == {"cancelled": 1}


async def test_losing_a_stream_cancels_it(autojump_clock: MockClock) -> None:
    async with opened(joint()) as session:
        stream = session.stream([1], sampling=LONG)
        await stream.__anext__()
        del stream
        await session.executor.idle()
        assert session.executor.core.ledger.ended == {"cancelled": 1}


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
    session.executor.core.ledger.check()
    assert session.executor.core.ledger.ended == {"cancelled": 1}


async def test_an_error_in_the_block_comes_out_as_it_is(autojump_clock: MockClock) -> None:
    with pytest.raises(KeyError):
        async with joint().open():
            raise KeyError("mine")


async def test_one_id_runs_once_and_the_first_goes_on(autojump_clock: MockClock) -> None:
    async with opened(joint()) as session:
        first = session.stream([1], sampling=LONG, request_id="r")
        await first.__anext__()
        with pytest.raises(RequestError, match="running already"):
            await session.generate([1], request_id="r")
        await session.stream([1], request_id="r").aclose()  # it never began
        assert [event.finish_reason async for event in first][-1] == "length"


async def test_an_id_is_free_once_its_request_has_left_the_engine(
    autojump_clock: MockClock,
) -> None:
    async with opened(joint()) as session:
        first = session.stream([1], sampling=LONG, request_id="r")
        await first.__anext__()
        await first.aclose()
        with pytest.raises(RequestError, match="running already"):
            await session.generate([1], request_id="r")
        await session.idle()
        again = await session.generate([1], sampling=LONG, request_id="r")
    assert again.finish_reason == "length"


async def test_a_closed_stream_is_at_its_end(autojump_clock: MockClock) -> None:
    async with opened(joint()) as session:
        stream = session.stream([1], sampling=LONG)
        await stream.__anext__()
        await stream.aclose()
        assert [event async for event in stream] == []


async def test_a_stream_outlives_its_session_at_its_end(autojump_clock: MockClock) -> None:
    async with joint().open() as session:
        stream = session.stream([1], sampling=LONG)
        await stream.__anext__()
    assert [event.finish_reason async for event in stream][-1] == "cancelled"
    with pytest.raises(RequestError, match="stopped"):
        await session.generate([1])


async def test_cancelled_before_all_choices_are_in_every_choice_ends(
    autojump_clock: MockClock,
) -> None:
    graph = Graph("g").engine("g", device="null")
    graph >> ops.generate(engine="g", max_inflight=1)  # nothing queues: the source waits
    async with opened(graph) as session:
        many = Sampling(max_tokens=50, n=3, ignore_eos=True)
        stream = session.stream([1], sampling=many)
        with trio.move_on_after(0.1):
            await stream.__anext__()
        reasons = [event.finish_reason async for event in stream if event.is_last]
    assert reasons == ["cancelled"] * 3


async def test_a_cancel_ends_choices_that_wait_at_the_source(autojump_clock: MockClock) -> None:
    graph = Graph("g").engine("g", device="null")
    graph >> ops.generate(engine="g", max_inflight=1)
    async with opened(graph) as session, trio.open_nursery() as nursery:
        many = Sampling(max_tokens=50, n=3, ignore_eos=True)
        nursery.start_soon(lambda: session.generate_all([1], sampling=many, request_id="r"))
        await trio.sleep(0.1)
        session.cancel("r")
        await session.idle()
        assert session.executor.core.ledger.ended == {"cancelled": 3}


async def test_a_time_limit_ends_with_its_request(autojump_clock: MockClock) -> None:
    async with opened(joint()) as session:
        await session.generate([1], sampling=Sampling(max_tokens=2), request_id="r", timeout_s=1)
        answer = await session.generate(
            [1], sampling=Sampling(max_tokens=200, ignore_eos=True), request_id="r"
        )
    assert answer.finish_reason == "length"


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"prioritty": 1}, "did you mean 'priority'"),
        ({"sampling": Sampling(temperature=float("nan"))}, "temperature is nan"),
        ({"sampling": Sampling(top_p=0)}, "top_p is 0"),
        ({"sampling": Sampling(max_tokens=0)}, "max_tokens is 0"),
        ({"sampling": Sampling(n=0)}, "n is 0"),
        ({"sampling": Sampling(stop_token_ids=("a",))}, "stop_token_ids"),  # type: ignore[arg-type]
        ({"sampling": Sampling(logit_bias={1: 1e308})}, "logit_bias"),
        ({"sampling": {"temperature": 1}}, "sampling is a Sampling, not dict"),
        ({"timeout_s": float("nan")}, "timeout_s"),
        ({"timeout_s": "5"}, "timeout_s"),
        ({"priority": "urgent"}, "priority"),
        ({"priority": 9}, "priority"),
        ({"request_id": 5}, "request_id"),
        ({"tags": [1]}, "tags"),
        ({"sampling": Sampling(stop=("",))}, "stop holds an empty string"),
        ({"sampling": Sampling(min_tokens=9, max_tokens=8)}, "more than max_tokens"),
    ],
)
async def test_bad_fields_are_refused_before_they_enter(
    fields: dict[str, Any], says: str, autojump_clock: MockClock
) -> None:
    async with opened(joint()) as session:
        with pytest.raises(RequestError, match=says):
            session.stream([1], **fields)
        assert session.executor.core.ledger.num_accepted == 0


@pytest.mark.parametrize(
    ("prompt", "says"),
    [
        ([], "empty"),
        ([-1], "-1"),
        ([1 << 40], "token id"),
        ([1.5], "1.5"),
        ([True], "True"),
        (["a"], "'a'"),
        (None, "NoneType"),
        (b"abc", "bytes"),
        ("\ud800", "Unicode"),
    ],
)
async def test_what_is_no_prompt_is_refused(
    prompt: Any, says: str, autojump_clock: MockClock
) -> None:
    async with opened(joint()) as session:
        with pytest.raises(RequestError, match=says):
            session.stream(prompt)


async def test_a_priority_may_be_named(autojump_clock: MockClock) -> None:
    async with opened(joint()) as session:
        async with trio.open_nursery() as nursery:
            for priority in ("high", 3):
                nursery.start_soon(
                    lambda p=priority: session.generate([1], sampling=LONG, priority=p)
                )
        assert session.executor.core.ledger.ended == {"length": 2}


async def test_a_token_that_the_model_does_not_know_is_refused(autojump_clock: MockClock) -> None:
    async with opened(joint()) as session:
        with pytest.raises(RequestRefused, match=str(1 << 20)) as caught:
            await session.generate([1 << 20], sampling=LONG)
    assert caught.value.code == "bad_request"


async def test_a_prompt_too_long_for_the_model_is_refused(autojump_clock: MockClock) -> None:
    async with opened(joint(max_model_len=64)) as session:
        with pytest.raises(RequestRefused, match="64"):
            await session.generate([1] * 65)
        with pytest.raises(RequestRefused, match="64"):
            await anext(session.stream([1] * 65))


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
        with pytest.raises(RequestFailed) as caught:
            await session.generate([1], sampling=LONG)
        assert "private" not in (caught.value.end.error or "")
        await trio.sleep(5)
        (load,) = session.statistics().engines["g"]
        assert (load.num_running, load.num_leased_blocks) == (0, 0)
        assert load.num_steps < 10


@pytest.mark.parametrize("at", [0, 3])
async def test_a_function_that_raises_on_a_split_path_ends_its_request_once(
    at: int, autojump_clock: MockClock
) -> None:
    def raising(event: TokenEvent) -> str:
        return broken(event) if event.position == at else event.text

    graph = Graph("g").engine("p", device="null").engine("d", device="null")
    for operator in (
        ops.prefill(engine="p"),
        ops.kv_transfer(),
        ops.decode(engine="d"),
        ops.map(raising),
    ):
        graph >> operator
    async with opened(graph) as session:
        for _ in range(2):  # the id is free again afterwards
            with pytest.raises(RequestFailed):
                await session.generate([1], sampling=LONG, request_id="r")
            await session.idle()


@pytest.mark.parametrize("how", ["cancel", "expire", "leave"])
async def test_an_answer_in_a_function_can_be_cancelled(
    how: str, autojump_clock: MockClock
) -> None:
    async with opened(joint(ops.collect(), ops.map(name_slowly))) as session:
        timeout_s = 0.8 if how == "expire" else None
        fields = {"request_id": "r"} | ({"timeout_s": timeout_s} if timeout_s else {})
        stream = session.stream([1], sampling=LONG, **fields)
        async with stream, trio.open_nursery() as nursery:

            @nursery.start_soon
            async def end() -> None:
                await trio.sleep(0.8)  # the answer is whole, the function still reads it
                if how == "cancel":
                    session.cancel("r")
                elif how == "leave":
                    await stream.aclose()

            reasons = [item.finish_reason async for item in stream]
        assert reasons == {"cancel": ["cancelled"], "expire": ["expired"], "leave": []}[how]


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
        with pytest.raises(RequestFailed) as caught:
            await session.generate([1], sampling=LONG)
    answer = caught.value.end
    assert answer.stamps.arrived_s == 3
    assert len(answer.token_ids) == 5


async def test_an_id_that_is_still_ending_is_not_given_again(autojump_clock: MockClock) -> None:
    async with opened(joint()) as session:
        stream = session.stream([1], sampling=LONG, request_id="req-1")
        await stream.take()
        await wait_all_tasks_blocked()  # a step is under way: the request stays until its end
        await stream.aclose()
        assert "req-1" in session.executor.core.register
        assert (await session.generate([1], sampling=LONG)).request_id == "req-2"
