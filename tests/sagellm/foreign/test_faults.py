"""What becomes of requests when their server is busy, fails, breaks off, or goes away."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
import trio
from endings import generate
from foreign_graph import graph, upstream
from scripted_server import Call, Server, delta, error, text, used
from waiting import until

from sagellm import Sampling
from sagellm.foreign.foreign_engine import ForeignEngine
from sagellm.session import Session

CHAT = [{"role": "user", "content": "hello"}]


class Scripts:
    """Gives each generation call the next script; the last one stays."""

    def __init__(self, *scripts: Any) -> None:
        self.scripts = list(scripts)
        self.is_healthy = True

    async def __call__(self, call: Call) -> None:
        if call.path == "/health":
            await call.whole({}, 200 if self.is_healthy else 500)
        else:
            script = self.scripts.pop(0) if len(self.scripts) > 1 else self.scripts[0]
            await script(call)


async def answers(call: Call) -> None:
    await call.events(text("a "), text("b "), text("", "stop"), used(3, 2))
    await call.done()


async def breaks_off(call: Call) -> None:
    await call.events(text("a "))
    await call.cut()


async def fails(call: Call) -> None:
    await call.whole(error("out of memory", 500), 500)


def refuses(status: int, message: str, **headers: str) -> Any:
    async def script(call: Call) -> None:
        await call.whole(error(message, status), status, **headers)

    return script


@asynccontextmanager
async def before(*scripts: Any, **options: Any) -> AsyncIterator[tuple[Scripts, Server, Session]]:
    script = Scripts(*scripts)
    async with (
        upstream(script) as server,
        graph(server.url, **{"probe_s": 0.05, **options}).open() as session,
    ):
        yield script, server, session
        session.executor.core.ledger.check()
        assert session.executor.core.is_at_rest


def engine_of(session: Session) -> ForeignEngine:
    (engine,) = session.executor.all_engines
    assert isinstance(engine, ForeignEngine)
    return engine


async def test_tokens_are_counted_as_the_server_counts_them() -> None:
    async def script(call: Call) -> None:
        await call.events(text("two words "), text("more", "length"), used(3, 7))
        await call.done()

    async with before(script) as (_, _, session):
        answer = await session.generate("prompt", sampling=Sampling(max_tokens=7))
    assert (answer.text, answer.num_tokens, answer.num_prompt_tokens) == ("two words more", 7, 3)
    assert answer.finish_reason == "length"


async def test_a_busy_server_is_asked_again() -> None:
    busy = refuses(429, "too many", retry_after="0.01")
    async with before(busy, busy, answers) as (_, server, session):
        answer = await session.generate("prompt")
    assert answer.text == "a b "
    assert len(server.asked) == 3


async def test_a_server_that_stays_busy_refuses_with_its_own_wait() -> None:
    async with before(refuses(503, "full", retry_after="0.01")) as (_, server, session):
        answer = await generate(session, "prompt")
    assert (answer.finish_reason, answer.code) == ("refused", "unavailable")
    assert answer.retry_after_s == 0.01
    assert len(server.asked) == 3


@pytest.mark.parametrize(("status", "code"), [(400, "bad_request"), (422, "bad_request")])
async def test_a_refusal_keeps_the_words_of_the_server(status: int, code: str) -> None:
    async with before(refuses(status, "top_k is negative")) as (_, server, session):
        answer = await generate(session, "prompt")
    assert (answer.finish_reason, answer.code, answer.error) == (
        "refused",
        code,
        "top_k is negative",
    )
    assert len(server.asked) == 1


async def test_a_refused_key_is_the_fault_of_the_graph_not_of_the_caller() -> None:
    async with before(refuses(401, "who are you?")) as (_, _, session):
        answer = await generate(session, "prompt")
    assert answer.finish_reason == "failed"
    assert "who are you" not in (answer.error or "")


async def test_the_key_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAR_KEY", "s3cret")
    async with before(answers, api_key_env="FAR_KEY") as (_, server, session):
        await session.generate("prompt")
    assert {call.headers["authorization"] for call in server.calls} == {"Bearer s3cret"}


async def test_an_answer_that_breaks_off_goes_on_after_its_text() -> None:
    async with before(breaks_off, answers) as (_, server, session):
        answer = await session.generate("prompt: ")
    assert (answer.text, answer.num_tokens) == ("a a b ", 3)
    assert [body["prompt"] for body in server.asked] == ["prompt: ", "prompt: a "]


async def test_a_chat_that_breaks_off_ends_where_its_server_cannot_go_on() -> None:
    async def script(call: Call) -> None:
        await call.events(delta("a "))
        await call.cut()

    async with before(script) as (_, _, session):
        answer = await generate(session, CHAT)
    assert (answer.finish_reason, answer.code) == ("refused", "engine_failed")
    assert "cannot go on" in (answer.error or "")


async def test_a_chat_goes_on_as_a_message_of_the_assistant() -> None:
    async def first(call: Call) -> None:
        await call.events(delta("a "))
        await call.cut()

    async def second(call: Call) -> None:
        await call.events(delta("b", "stop"), used(4, 1))
        await call.done()

    async with before(first, second, can_resume=True) as (_, server, session):
        answer = await session.generate(CHAT)
    assert answer.text == "a b"
    body = server.asked[-1]
    assert body["messages"] == [*CHAT, {"role": "assistant", "content": "a "}]
    assert (body["continue_final_message"], body["add_generation_prompt"]) == (True, False)


@pytest.mark.parametrize(
    "broken",
    [
        lambda call: call.events("no json"),
        lambda call: call.events(error("the engine died", 500)),
        lambda call: call.whole({"choices": []}),
    ],
)
async def test_an_answer_that_makes_no_sense_is_asked_of_another_server(broken: Any) -> None:
    async with (
        upstream(Scripts(broken)) as first,
        upstream(Scripts(answers)) as second,
        graph(first.url, second.url).open(set={"route.strategy": "round_robin"}) as session,
    ):
        answer = await session.generate("prompt")
    assert answer.text == "a b "
    assert (len(first.asked), len(second.asked)) == (1, 1)


async def test_a_server_that_fails_again_and_again_is_down_until_a_probe_succeeds() -> None:
    async with before(fails) as (script, server, session):
        script.is_healthy, engine = False, engine_of(session)
        for _ in range(5):
            assert engine.is_up
            assert (await generate(session, "prompt")).finish_reason == "failed"
        assert not engine.is_up
        refused = await generate(session, "prompt")
        assert (refused.finish_reason, refused.code) == ("refused", "unavailable")
        assert len(server.asked) == 5
        script.scripts, script.is_healthy = [answers], True
        await until(lambda: engine.is_up)
        assert (await session.generate("prompt")).text == "a b "


def goes_down(engine: list[ForeignEngine]) -> Any:
    """Says the beginning of an answer, and then goes down."""

    async def script(call: Call) -> None:
        await call.events(text("a "))
        engine[0]._set_up(False)
        await call.cut()

    return script


async def test_an_answer_waits_for_its_server_to_come_up_again() -> None:
    engine: list[ForeignEngine] = []
    async with before(goes_down(engine), answers) as (script, server, session):
        engine.append(engine_of(session))
        script.is_healthy = False
        events: list[Any] = []
        async with session.stream("prompt: ") as stream:
            events += await stream.take()
            await until(lambda: sum(call.path == "/health" for call in server.calls) >= 2)
            assert len(server.asked) == 1
            script.is_healthy = True
            while batch := await stream.take():
                events += batch
    assert "".join(event.text for event in events) == "a a b "


async def test_an_answer_does_not_wait_for_ever() -> None:
    engine: list[ForeignEngine] = []
    async with upstream(Scripts(goes_down(engine))) as server:
        door = graph(server.url, probe_s=60.0).open(set={"executor.max_hold_s": 0.1})
        async with door as session:
            engine.append(engine_of(session))
            answer = await generate(session, "prompt")
    assert (answer.finish_reason, answer.code) == ("refused", "unavailable")


async def test_a_cancel_closes_the_call() -> None:
    left = trio.Event()

    async def script(call: Call) -> None:
        await call.events(text("a "))
        await call.gone()
        left.set()

    async with before(script) as (_, _, session):
        async with session.stream("prompt") as stream:
            assert [event.text for event in await stream.take()] == ["a "]
        with trio.fail_after(5):
            await left.wait()
            await session.idle()
        assert engine_of(session).load.num_running == 0


async def test_a_server_that_says_nothing_is_left() -> None:
    async def silent(call: Call) -> None:
        await call.events(text("a "))
        await call.gone()

    async with before(silent, answers, read_s=0.2) as (_, _, session):
        answer = await session.generate("prompt")
    assert answer.text == "a a b "
