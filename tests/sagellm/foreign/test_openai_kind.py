"""An engine behind a server that speaks the OpenAI API, here another sagellm."""

import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import openai
import pytest
import trio
from foreign_graph import graph, upstream
from gateway_session import ServedSession, served_session
from scripted_server import Call, text
from waiting import until

from sagellm import Graph, Sampling, ops
from sagellm.graphs.diagnostics import GraphError
from sagellm.runtime.engine.options import EngineOptionError
from sagellm.runtime.messages import TokenEvent
from sagellm.runtime.sampling import Grammar
from sagellm.session import Session

PROMPT = "the quick brown fox"
GREEDY = Sampling(max_tokens=12, ignore_eos=True)


def token(event: TokenEvent) -> dict[str, Any]:
    """A chunk with the text and the id of one token."""
    chunk = text(event.text)
    chunk["choices"][0]["token_ids"] = event.token_ids
    return chunk


async def tokens(session: Session, prompt: Any, sampling: Sampling) -> list[TokenEvent]:
    stream = session.stream(prompt, sampling=sampling)
    return [event async for event in stream if isinstance(event, TokenEvent)]


def url_of(served: ServedSession) -> str:
    return f"http://127.0.0.1:{served.port}"


@asynccontextmanager
async def far(**options: Any) -> AsyncIterator[tuple[ServedSession, Session]]:
    """A served sage-tiny, and a session before it."""
    async with (
        served_session("hypercorn", "joint", {"g.model": "sage-tiny"}) as served,
        graph(url_of(served), **options).open() as session,
    ):
        yield served, session
        session.executor.core.ledger.check()


async def alone(served: ServedSession, prompt: Any, sampling: Sampling) -> Any:
    return await served.session.generate(prompt, sampling=sampling)


@pytest.mark.parametrize("options", [{}, {"tokenizer": "sage-tiny"}])
async def test_an_answer_is_that_of_the_server(options: dict[str, Any]) -> None:
    async with far(**options) as (served, session):
        wanted = await alone(served, PROMPT, GREEDY)
        answer = await session.generate(PROMPT, sampling=GREEDY)
        assert (answer.text, answer.finish_reason) == (wanted.text, "length")
        assert (answer.num_tokens, answer.num_prompt_tokens) == (12, wanted.num_prompt_tokens)
        assert answer.token_ids == (wanted.token_ids if options else ())
        assert served.is_at_rest


async def test_a_stream_is_the_whole_and_messages_reach_the_server() -> None:
    messages = [{"role": "user", "content": "say something"}]
    async with far() as (served, session):
        wanted = await alone(served, messages, GREEDY)
        events = await tokens(session, messages, GREEDY)
    assert "".join(event.text for event in events) == wanted.text
    assert [event.position for event in events if event.num_tokens] == sorted(
        {event.position for event in events if event.num_tokens}
    )
    assert sum(event.num_tokens for event in events) == 12


async def test_choices_differ_and_a_seed_repeats_them() -> None:
    sampling = Sampling(max_tokens=8, temperature=1.0, seed=7, n=3, ignore_eos=True)
    async with far() as (_, session):
        first = await session.generate_all(PROMPT, sampling=sampling)
        again = await session.generate_all(PROMPT, sampling=sampling)
    assert len({answer.text for answer in first}) == 3
    assert [answer.text for answer in first] == [answer.text for answer in again]


async def test_stop_strings_end_an_answer_at_the_server() -> None:
    async with far() as (served, session):
        whole = (await alone(served, PROMPT, GREEDY)).text
        stop = whole[-3:]
        sampling = Sampling(max_tokens=12, ignore_eos=True, stop=(stop,))
        answer = await session.generate(PROMPT, sampling=sampling)
    assert (answer.finish_reason, answer.stop_reason) == ("stop", stop)
    assert answer.text == whole[: whole.index(stop)]


async def test_a_grammar_binds_answers_of_token_ids() -> None:
    grammar = Grammar(kind="regex", text="(yes|no)")
    async with far(tokenizer="sage-tiny") as (_, session):
        answer = await session.generate(PROMPT, sampling=Sampling(grammar=grammar))
    assert answer.text in ("yes", "no")


async def test_log_probabilities_are_those_of_the_server() -> None:
    sampling = Sampling(max_tokens=6, ignore_eos=True, logprobs=3)
    async with far(tokenizer="sage-tiny") as (served, session):
        wanted = await alone(served, PROMPT, sampling)
        answer = await session.generate(PROMPT, sampling=sampling)
    assert len(answer.logprobs) == 6
    for found, own in zip(answer.logprobs, wanted.logprobs, strict=True):
        assert (found.token_id, found.logprob) == (own.token_id, pytest.approx(own.logprob))
        assert [token for token, _ in found.top] == [token for token, _ in own.top]


async def test_a_cancel_closes_the_call_and_frees_what_it_held() -> None:
    async with far() as (served, session):
        long = Sampling(max_tokens=400, ignore_eos=True)
        async with session.stream(PROMPT, sampling=long) as stream:
            await stream.take()
        with trio.fail_after(5):
            await session.idle()
            await until(lambda: served.is_at_rest)


@pytest.mark.parametrize("options", [{}, {"tokenizer": "sage-tiny"}])
async def test_an_answer_goes_on_at_another_server_where_its_own_is_lost(
    options: dict[str, Any],
) -> None:
    sampling = Sampling(max_tokens=40, ignore_eos=True)
    async with served_session("hypercorn", "joint", {"g.model": "sage-tiny"}) as served:
        events = await tokens(served.session, PROMPT, sampling)
        begun = [token(event) for event in events[:5]]

        async def script(call: Call) -> None:
            if call.json.get("stream"):
                await call.events(*begun)
                await call.cut()
            else:
                await call.whole(begun[0])

        async with (
            upstream(script) as cut,
            graph(cut.url, url_of(served), **options).open() as session,
        ):
            answer = await session.generate(PROMPT, sampling=sampling)
            assert session.executor.core.recovery.num_migrated == 1
            session.executor.core.ledger.check()
    assert answer.text == "".join(event.text for event in events)
    assert answer.num_tokens == 40


def test_faulty_options_are_refused_before_anything_opens() -> None:
    for options, why in (
        ({"urls": []}, "give the URL of at least one server"),
        ({"urls": ["ftp://far"]}, "not the URL of an HTTP server"),
        ({"urls": ["http://me:secret@far"]}, "holds a password"),
        ({"urls": ["http://far"], "api_key_env": "NO_SUCH_KEY"}, "has no NO_SUCH_KEY"),
        ({"urls": ["http://far"], "modell": "m"}, "did you mean `model`"),
        ({"urls": ["http://far"], "threads": 2}, "is an option of kind `local`"),
        ({}, "urls"),
    ):
        chain = Graph("door").engine("far", kind="openai", **options) >> ops.generate(engine="far")
        with pytest.raises(GraphError, match=re.escape(why)), chain.open():
            raise AssertionError


async def test_a_server_that_is_not_there_is_named() -> None:
    with pytest.RaisesGroup(
        pytest.RaisesExc(EngineOptionError, match="no server answers at http://127.0.0.1:9"),
        flatten_subgroups=True,
        allow_unwrapped=True,
    ):
        async with graph("http://127.0.0.1:9", start_s=0.0).open():
            raise AssertionError


def asked_by_openai(url: str) -> list[Any]:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="any") as client:
        stream = client.chat.completions.create(
            model="m",
            messages=[{"role": "user", "content": "hello"}],
            max_tokens=12,
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
            extra_body={"ignore_eos": True},
        )
        return list(stream)


async def test_the_gateway_serves_what_a_server_answers() -> None:
    """openai-python through our gateway, before a server that is another sagellm."""
    async with served_session("hypercorn", "joint", {"g.model": "sage-tiny"}) as served:
        wanted = await alone(served, [{"role": "user", "content": "hello"}], GREEDY)
        far_options = {"g.kind": "openai", "g.model": "m", "g.urls": [url_of(served)]}
        async with served_session("hypercorn", "joint", far_options) as door:
            chunks = await trio.to_thread.run_sync(asked_by_openai, url_of(door))
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == wanted.text
    usage = chunks[-1].usage
    assert usage is not None
    assert (usage.completion_tokens, usage.prompt_tokens) == (12, wanted.num_prompt_tokens)
