"""Mistakes in Python calls: each raises at once, with the form that works."""

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
import trio

from sagellm import (
    AsyncUnifiedInferenceClient,
    ClientError,
    Graph,
    RequestError,
    Sampling,
    UnifiedInferenceClient,
    UsageError,
    ops,
)
from sagellm.client.responses import MISUSED
from sagellm.client.server import AsyncServerConnection, ServerConnection

URL = "http://127.0.0.1:9"  # no server listens there, and no call may try it
SHORT = Sampling(max_tokens=3, ignore_eos=True)


def graph() -> Graph:
    return Graph("g").engine("g", device="null", model="null") >> ops.generate(engine="g")


# ---- a blocking call in a loop -----------------------------------------------------------------


def open_it(session: Any) -> None:
    graph().open().__enter__()


BLOCKING: dict[str, Callable[[Any], Any]] = {
    "with graph.open()": open_it,
    "generate": lambda session: session.generate([1], sampling=SHORT),
    "generate_all": lambda session: session.generate_all([1], sampling=SHORT),
    "stream": lambda session: session.stream([1], sampling=SHORT),
    "idle": lambda session: session.idle(),
}


@pytest.mark.parametrize("loop", ["trio", "asyncio"])
@pytest.mark.parametrize("call", BLOCKING)
def test_a_blocking_call_in_a_loop_raises_at_once(call: str, loop: str) -> None:
    async def main(session: Any) -> None:
        says = f"blocks the {loop} loop .* use `async with"
        with pytest.raises(UsageError, match=says) as caught:
            BLOCKING[call](session)
        assert "\n" not in str(caught.value)

    with graph().open() as session:
        run(loop, main, session)


@pytest.mark.parametrize("loop", ["trio", "asyncio"])
def test_reading_a_blocking_stream_in_a_loop_raises_at_once(loop: str) -> None:
    async def main(stream: Any) -> None:
        with pytest.raises(UsageError, match="reading a blocking stream blocks"):
            next(stream)

    with graph().open() as session, session.stream([1], sampling=SHORT) as stream:
        run(loop, main, stream)
        assert len(list(stream)) == 3


@pytest.mark.parametrize("loop", ["trio", "asyncio"])
@pytest.mark.parametrize("method", ["chat", "generate", "embed", "models", "get_status"])
def test_the_blocking_client_in_a_loop_raises_at_once(method: str, loop: str) -> None:
    async def main(client: Any) -> None:
        arguments = () if method in ("models", "get_status") else (["a"],)
        with pytest.raises(ClientError, match="use AsyncUnifiedInferenceClient") as caught:
            getattr(client, method)(*arguments)
        assert caught.value.code == MISUSED

    with UnifiedInferenceClient.create(URL) as client:
        run(loop, main, client)


@pytest.mark.parametrize("loop", ["trio", "asyncio"])
def test_an_embedded_blocking_client_is_not_opened_in_a_loop(loop: str) -> None:
    async def main(_: None) -> None:
        with pytest.raises(ClientError, match="use AsyncUnifiedInferenceClient"):
            UnifiedInferenceClient.create(embedded=True)

    run(loop, main, None)


def test_a_thread_of_a_loop_may_block() -> None:
    async def main() -> int:
        def ask() -> int:
            with graph().open() as session:
                return len(session.generate([1], sampling=SHORT).token_ids)

        return await trio.to_thread.run_sync(ask) + await trio.to_thread.run_sync(ask)

    assert trio.run(main) == 6


def run(loop: str, main: Callable[[Any], Any], argument: Any) -> None:
    if loop == "trio":
        trio.run(main, argument)
    else:
        asyncio.run(main(argument))


# ---- the wrong form ----------------------------------------------------------------------------


async def with_without_async(stream: Any) -> None:
    with stream:
        pass


async def for_without_async(stream: Any) -> None:
    for _ in stream:
        pass


async def awaited(stream: Any) -> None:
    await stream


async def async_with(stream: Any) -> None:
    async with stream:
        pass


async def async_for(stream: Any) -> None:
    async for _ in stream:
        pass


ASYNC_FORMS = [(with_without_async, "async with"), (for_without_async, "async for"),
               (awaited, "not awaited")]  # fmt: skip
BLOCKING_FORMS = [(async_with, "entered with `with`"), (async_for, "read with `for`")]


@pytest.mark.parametrize("loop", ["trio", "asyncio"])
@pytest.mark.parametrize(("form", "says"), ASYNC_FORMS)
def test_a_stream_of_an_async_session_says_how_it_is_read(loop: str, form: Any, says: str) -> None:
    async def main(_: None) -> None:
        async with graph().open() as session, session.stream([1], sampling=SHORT) as stream:
            with pytest.raises(UsageError, match=says):
                await form(stream)

    run(loop, main, None)


@pytest.mark.parametrize(("form", "says"), BLOCKING_FORMS)
def test_a_blocking_stream_says_how_it_is_read(form: Any, says: str) -> None:
    with graph().open() as session:
        stream = session.stream([1], sampling=SHORT)
        with pytest.raises(UsageError, match=says):
            asyncio.run(form(stream))


@pytest.mark.parametrize(
    ("form", "client", "says"),
    [
        (async_with, UnifiedInferenceClient, "AsyncUnifiedInferenceClient"),
        (with_without_async, AsyncUnifiedInferenceClient, "entered with `async with`"),
    ],
)
def test_a_client_says_how_it_is_entered(form: Any, client: Any, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        trio.run(form, client.create(URL))


@pytest.mark.parametrize("name", ["stream", "generate", "generate_all", "cancel", "health"])
@pytest.mark.parametrize("closed", [lambda: graph(), lambda: graph().open()])
def test_a_graph_that_is_not_open_says_how_to_open_it(closed: Any, name: str) -> None:
    with pytest.raises(AttributeError, match=rf"{name} is a method of an open graph: `async with"):
        getattr(closed(), name)
    with pytest.raises(AttributeError, match="has no attribute 'other'"):
        _ = closed().other


async def test_a_graph_is_not_awaited() -> None:
    with pytest.raises(UsageError, match=r"async with graph\.open"):
        await graph().open()


# ---- too early, too late, twice ----------------------------------------------------------------


def test_a_blocking_session_after_it_was_closed() -> None:
    with graph().open() as session:
        pass
    for call in (*list(BLOCKING.values())[1:], lambda session: session.statistics()):
        with pytest.raises(RequestError, match="the graph has stopped; open it again"):
            call(session)


@pytest.mark.parametrize("loop", ["trio", "asyncio"])
def test_an_async_session_after_it_was_closed(loop: str) -> None:
    async def main(_: None) -> None:
        async with graph().open() as session:
            pass
        with pytest.raises(RequestError, match="the graph has stopped; open it again"):
            await session.generate([1], sampling=SHORT)
        with pytest.raises(RequestError, match="the graph has stopped; open it again"):
            async for _ in session.stream([1], sampling=SHORT):
                pass

    run(loop, main, None)


def test_a_graph_is_opened_once_at_a_time() -> None:
    opening = graph().open()
    for _ in range(2):  # again after it was closed
        with opening, pytest.raises(UsageError, match="is open already"):
            opening.__enter__()


@pytest.mark.parametrize("served", ["embedded", "http"])
def test_a_client_after_it_was_closed(served: str) -> None:
    client = UnifiedInferenceClient(ServerConnection(URL, None, 1.0))
    if served == "embedded":
        client = UnifiedInferenceClient.create(embedded=True)
    client.close()
    client.close()
    with pytest.raises(ClientError, match="the client is closed; create another one") as caught:
        client.chat([{"role": "user", "content": "a"}])
    assert caught.value.code == MISUSED


async def test_an_async_client_after_it_was_closed() -> None:
    client = AsyncUnifiedInferenceClient.create(URL)
    assert isinstance(await client._served(), AsyncServerConnection)
    await client.aclose()
    with pytest.raises(ClientError, match="the client is closed; create another one"):
        await client.models()


# ---- wrong values ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"temperature": "hot"}, "temperature is 'hot'; it must be a number"),
        ({"max_tokens": 3.5}, "max_tokens is 3.5; it must be a whole number"),
        ({"max_tokens": True}, "max_tokens is True; it must be a whole number"),
        ({"max_tokens": None}, "max_tokens is None; it must be a whole number"),
        ({"seed": "1"}, "seed is '1'; it must be a whole number"),
        ({"stop": "a"}, "stop is 'a'; it must be a tuple of strings"),
        ({"logit_bias": [1]}, "logit_bias is [1]; it must be a dict"),
    ],
)
def test_sampling_is_checked_where_it_is_made(wrong: dict[str, Any], says: str) -> None:
    with pytest.raises(TypeError) as caught:
        Sampling(**wrong)
    assert str(caught.value).startswith(says)


@pytest.mark.parametrize(
    ("field", "says"),
    [
        ("max_tokens", r"it belongs to the sampling: sampling=Sampling\(max_tokens=\.\.\.\)"),
        ("max_token", r"did you mean sampling=Sampling\(max_tokens=\.\.\.\)\?"),
        ("prioritty", "did you mean 'priority'?"),
        ("zzz", "known are request_id, priority"),
    ],
)
async def test_an_unknown_field_says_where_it_belongs(field: str, says: str) -> None:
    async with graph().open() as session:
        with pytest.raises(RequestError, match=says):
            await session.generate([1], **{field: 3})


@pytest.mark.parametrize(
    ("name", "hint"), [("jiont.yaml", "(did you mean joint?)"), ("a/b.yaml", "or one of embed, ")]
)
def test_a_graph_that_is_not_there(name: str, hint: str) -> None:
    with pytest.raises(FileNotFoundError, match="no such graph") as caught:
        Graph.load(name)
    assert name in str(caught.value)
    assert hint in str(caught.value)
