import threading
from collections.abc import Awaitable, Callable
from typing import Any

import anyio
import anyio.lowlevel
import msgspec
import pytest
from scripted_server import Call, Script, calling, error, scripted, telling, text

from sagellm import AsyncUnifiedInferenceClient, ClientError
from sagellm.client import server as server_async
from sagellm.client.replies import Usage
from sagellm.client.responses import CUT_OFF, NOT_OFFERED

ASK = [{"role": "user", "content": "Hello?"}]
Client = AsyncUnifiedInferenceClient


@pytest.fixture(params=["trio", "asyncio"])
def talk(request: pytest.FixtureRequest) -> Callable[..., Any]:
    """Runs a coroutine function on either loop, with a client of a scripted server."""

    def run(script: Script, main: Callable[[Client], Awaitable[Any]]) -> Any:
        async def connected() -> Any:
            async with Client.create(server.url, default_llm_model="m") as client:
                return await main(client)

        with scripted(script) as server:
            return anyio.run(connected, backend=request.param)

    return run


def test_whole_answers_and_models(talk: Any) -> None:
    async def main(client: Client) -> tuple[Any, ...]:
        chat, text = await client.chat(ASK), await client.generate("a")
        return chat, chat.finish_reason, text, await client.models()

    found = talk(telling("Good", " day"), main)
    assert found == ("Good day", "stop", "Good day", ["scripted"])


def test_a_stream(talk: Any) -> None:
    async def main(client: Client) -> tuple[Any, ...]:
        async with await client.chat(ASK, stream=True) as stream:
            return [piece async for piece in stream], stream.finish_reason, stream.usage

    end = (["Good", " day", ""], "stop", Usage(3, 2, 5))
    assert talk(telling("Good", " day"), main) == end


def test_a_server_that_refuses_stream_options_is_asked_without_them(talk: Any) -> None:
    refused = []

    async def refusing_usage(call: Call) -> None:
        refused.append("stream_options" in call.json)
        if refused[-1]:
            cause = {"loc": ["body", "stream_options"], "msg": "Extra inputs are not permitted"}
            return await call.whole({"detail": [cause]}, 422)
        return await telling("Good", " day")(call)

    async def main(client: Client) -> list[str]:
        found = []
        for _ in range(2):
            async with await client.generate("a", stream=True) as stream:
                found += [piece async for piece in stream]
        return found

    assert "".join(talk(refusing_usage, main)) == "Good dayGood day"
    assert refused == [True, False, False]


def test_leaving_or_cancelling_a_stream_hangs_up(talk: Any) -> None:
    left = threading.Semaphore(0)

    async def endless(call: Call) -> None:
        try:
            await call.events(text("a"))
            await call.gone()
        finally:  # the client may leave while the server writes
            left.release()

    async def main(client: Client) -> None:
        async with await client.generate("a", stream=True) as stream:
            assert await anext(stream) == "a"
        async with await client.generate("a", stream=True):
            pass  # no piece was read
        with anyio.CancelScope() as scope:
            async with await client.generate("a", stream=True) as stream:
                await anext(stream)
                scope.cancel()
                await anext(stream)

    talk(endless, main)
    assert all(left.acquire(timeout=30) for _ in range(3))


def test_failures_are_client_errors(talk: Any) -> None:
    async def refusing(call: Call) -> None:
        await call.whole(error("full", 503), 503, Retry_After="4")

    async def main(client: Client) -> ClientError:
        with pytest.raises(ClientError, match="full") as caught:
            await client.chat(ASK, stream=True)
        return caught.value

    found = talk(refusing, main)
    assert (found.status, found.retry_after_s) == (503, 4.0)


def test_a_stream_that_is_cut_is_an_error(talk: Any) -> None:
    async def cutting(call: Call) -> None:
        await call.events(text("a"))
        await call.cut()

    async def main(client: Client) -> tuple[list[str], str | None]:
        found = []
        async with await client.generate("a", stream=True) as stream:
            with pytest.raises(ClientError) as caught:  # noqa: PT012 - the loop is what raises
                async for piece in stream:
                    found.append(piece)
        return found, caught.value.code

    assert talk(cutting, main) == (["a"], CUT_OFF)


def test_status_and_embeddings(talk: Any) -> None:
    async def offering(call: Call) -> None:
        vector = {"data": [{"index": 0, "embedding": [1]}]}
        known = {"/health": b"", "/v1/embeddings": vector}
        if call.path in known:
            return await call.whole(known[call.path])
        await call.whole(error("no such endpoint", 404), 404)

    async def main(client: Client) -> tuple[Any, ...]:
        return await client.embed("a"), await client.get_status()

    vectors, status = talk(offering, main)
    assert vectors == [[1.0]]
    assert (status["is_ready"], status["version"]) == (True, None)


def test_a_server_without_embeddings_says_so(talk: Any) -> None:
    async def bare(call: Call) -> None:
        await call.whole(error("no such endpoint", 404), 404)

    async def main(client: Client) -> str | None:
        with pytest.raises(ClientError, match="no embeddings") as caught:
            await client.embed("a")
        return caught.value.code

    assert talk(bare, main) == NOT_OFFERED


def test_a_local_server_is_found_at_the_first_call(monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        client = Client.create()
        assert client.url is None
        assert await client.generate("a") == "yes"
        assert client.url == server.url
        await client.aclose()

    monkeypatch.delenv("SAGELLM_URL", raising=False)
    with scripted(telling("yes")) as server:
        monkeypatch.setattr(server_async, "LOCAL", ("http://127.0.0.1:9", server.url))
        anyio.run(main, backend="trio")
    with pytest.raises(ClientError, match="sagellm serve"):
        anyio.run(main, backend="trio")


class Person(msgspec.Struct):
    name: str


def test_an_answer_and_the_end_of_a_stream_are_parsed(talk: Any) -> None:
    async def main(client: Client) -> list[Person]:
        whole = await client.chat(ASK, response_format=Person)
        async with await client.generate("a", response_format=Person, stream=True) as stream:
            _ = [piece async for piece in stream]
        return [whole.parsed, stream.parsed]

    assert talk(telling('{"name":', '"Ada"}'), main) == [Person("Ada"), Person("Ada")]


def test_tools_of_both_kinds_are_called_until_the_model_answers(talk: Any) -> None:
    async def get_time(city: str) -> str:
        """The time in a city."""
        await anyio.lowlevel.checkpoint()
        return f"noon in {city}"

    def get_weather(city: str) -> str:
        """The weather of a city."""
        return f"sunny in {threading.current_thread() is threading.main_thread()}"

    async def main(client: Client) -> Any:
        return await client.run_tools(ASK, tools=[get_time, get_weather])

    city = '{"city":"Paris"}'
    run = talk(calling(("get_time", city), ("get_weather", city)), main)
    assert run.text == "noon in Paris sunny in False"
    assert [one["role"] for one in run.messages] == [
        "user",
        "assistant",
        "tool",
        "tool",
        "assistant",
    ]
