import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import msgspec
import pytest
from scripted_server import MODEL, Call, Script, Server, calling, error, scripted, telling, text

from sagellm import ClientError, UnifiedInferenceClient
from sagellm.client.reply_streams import ReplyStream
from sagellm.client.responses import BAD_ANSWER, CUT_OFF, NOT_OFFERED, TIMED_OUT, UNREACHABLE

ASK = [{"role": "user", "content": "Hello?"}]


@contextmanager
def talking(script: Script, **options: Any) -> Iterator[tuple[UnifiedInferenceClient, Server]]:
    """A client, and the server that it talks to."""
    with scripted(script) as server, UnifiedInferenceClient.create(server.url, **options) as client:
        yield client, server


@pytest.fixture
def told() -> Iterator[Any]:
    """A server that says two words, and a client of it."""
    with talking(telling("Good", " day"), api_key="k") as pair:
        yield pair


def test_a_chat_is_a_text_that_knows_how_it_ended(told: Any) -> None:
    client, server = told
    answer = client.chat(ASK, temperature=0.5, max_tokens=9)
    assert answer == "Good day"
    assert (answer.finish_reason, answer.usage.completion_tokens, answer.model) == (
        "stop",
        2,
        MODEL,
    )
    wanted = {"model": MODEL, "messages": ASK, "temperature": 0.5, "max_tokens": 9, "stream": False}
    assert server.asked == [wanted]
    assert server.calls[-1].headers["authorization"] == "Bearer k"


def test_generate_takes_text_or_token_ids(told: Any) -> None:
    client, server = told
    assert client.generate("a") == client.generate([1, 2], "other") == "Good day"
    assert [asked["prompt"] for asked in server.asked] == ["a", [1, 2]]
    assert [asked["model"] for asked in server.asked] == [MODEL, "other"]


def test_a_stream_yields_pieces_and_knows_its_end(told: Any) -> None:
    client, _ = told
    with client.chat(ASK, stream=True) as stream:
        assert list(stream) == ["Good", " day", ""]
    assert (stream.finish_reason, stream.usage.prompt_tokens) == ("stop", 3)
    assert stream.reply.usage is stream.usage
    assert "".join(client.generate("a", stream=True)) == "Good day"


def test_a_caller_may_have_a_stream_without_usage(told: Any) -> None:
    client, server = told
    for given in ({"include_usage": False}, None):
        with client.generate("a", stream=True, stream_options=given) as stream:
            assert "".join(stream) == "Good day"
    assert [asked["stream_options"]["include_usage"] for asked in server.asked] == [False, True]
    client.generate("a")
    assert "stream_options" not in server.asked[-1]


async def refusing_usage(call: Call) -> None:
    if "stream_options" in call.json:
        return await call.whole(error("unknown field: stream_options", 400), 400)
    return await telling("Good", " day")(call)


def test_a_server_that_refuses_stream_options_is_asked_without_them() -> None:
    with talking(refusing_usage) as (client, server):
        for _ in range(2):
            with client.chat(ASK, stream=True) as stream:
                assert "".join(stream) == "Good day"
            assert stream.usage is None
        assert ["stream_options" in asked for asked in server.asked] == [True, False, False]
        with pytest.raises(ClientError, match="unknown field"):
            client.chat(ASK, stream=True, stream_options={"include_usage": True})


def test_the_default_model_is_asked_for() -> None:
    with talking(telling("x"), default_llm_model="mine") as (client, server):
        client.generate("a")
    assert server.asked[0]["model"] == "mine"
    assert len(server.calls) == 1  # no call for the list of models


def test_many_threads_may_use_one_client(told: Any) -> None:
    client, _ = told
    answers: list[str] = []
    threads = [
        threading.Thread(target=lambda: answers.append(client.generate("a"))) for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == ["Good day"] * 8


def test_leaving_a_stream_hangs_up() -> None:
    left = threading.Event()

    async def endless(call: Call) -> None:
        try:
            await call.events(text("a"), text("b"))
            await call.gone()
        finally:  # the client may leave while the server writes
            left.set()

    with talking(endless) as (client, _):
        with client.generate("a", "m", stream=True) as stream:
            assert next(stream) == "a"
        assert left.wait(30)
        left.clear()
        unread = client.generate("a", "m", stream=True)
        unread.close()
        assert left.wait(30)
        left.clear()
        lost = client.generate("a", "m", stream=True)
        del lost
        assert left.wait(30)


async def refusing(call: Call) -> None:
    refusal = error("too many wait", 429, code="queue_full")
    await call.whole(refusal, 429, Retry_After="2", X_Should_Retry="true")


async def failing(call: Call) -> None:
    await call.whole(error("internal error", 500, code=None), 500)


async def cutting(call: Call) -> None:
    await call.events(text("a"))
    await call.cut()


async def ending_early(call: Call) -> None:
    await call.events(text("a"))
    await call.end()


async def erring(call: Call) -> None:
    await call.events(text("a"), error("died", 500))
    await call.done()


async def babbling(call: Call) -> None:
    await call.events(text("a"), "{not json")
    await call.done()


async def not_streaming(call: Call) -> None:
    await call.whole(text("a", "stop"))


async def silent(call: Call) -> None:
    await call.events(text("a"))
    await call.gone()


@pytest.mark.parametrize(
    ("script", "status", "code", "pieces"),
    [
        (refusing, 429, "queue_full", []),
        (failing, 500, None, []),
        (cutting, None, CUT_OFF, ["a"]),
        (ending_early, None, CUT_OFF, ["a"]),
        (erring, 500, "500", ["a"]),
        (babbling, None, BAD_ANSWER, ["a"]),
        (not_streaming, None, BAD_ANSWER, []),
        (silent, None, TIMED_OUT, ["a"]),
    ],
)
def test_every_failure_of_a_stream_is_an_error(
    script: Script, status: int | None, code: str | None, pieces: list[str]
) -> None:
    with talking(script, timeout=0.2 if script is silent else 60) as (client, _):
        found, error = read_all(lambda: client.generate("a", "m", stream=True))
    assert (error.status, error.code) == (status, code)
    assert found == pieces


def read_all(call: Callable[[], ReplyStream]) -> tuple[list[str], ClientError]:
    """The pieces before the error, and the error."""
    found: list[str] = []
    try:
        with call() as stream:
            found.extend(stream)  # keeps what came before it raised
    except ClientError as raised:
        return found, raised
    pytest.fail("no error")


def test_a_refusal_says_when_to_come_back() -> None:
    with (
        talking(refusing) as (client, _),
        pytest.raises(ClientError, match="too many") as caught,
    ):
        client.chat(ASK, "m")
    assert (caught.value.retry_after_s, caught.value.should_retry) == (2.0, True)


def test_an_answer_that_is_cut_is_an_error() -> None:
    async def cut(call: Call) -> None:
        await call.head(content_type="application/json")
        await call.send(b'{"choices": [')
        await call.cut()

    with talking(cut) as (client, _), pytest.raises(ClientError) as caught:
        client.generate("a", "m")
    assert caught.value.code == CUT_OFF


def test_nobody_there_is_said_with_the_url() -> None:
    client = UnifiedInferenceClient.create("http://127.0.0.1:9")
    with client, pytest.raises(ClientError, match="http://127") as caught:
        client.models()
    assert caught.value.code == UNREACHABLE


def test_a_prompt_that_is_no_text_is_an_error(told: Any) -> None:
    client, _ = told
    with pytest.raises(ClientError, match="no JSON"):
        client.generate("\udcff")


async def offering(call: Call) -> None:
    """A server with every endpoint; its embeddings are out of order."""
    answers: dict[str, Any] = {
        "/health": b"",
        "/load": {"server_load": 3},
        "/version": {"version": "1.2"},
        "/v1/embeddings": {
            "data": [{"index": 1, "embedding": [3, 4]}, {"index": 0, "embedding": [1, 2]}]
        },
    }
    await call.whole(answers[call.path])


async def bare(call: Call) -> None:
    await call.whole(error("no such endpoint", 404), 404)


def test_the_status_is_what_the_server_tells() -> None:
    with talking(offering) as (client, server):
        assert client.get_status() == {
            "mode": "http",
            "url": server.url,
            "is_ready": True,
            "models": [MODEL],
            "server_load": 3,
            "version": "1.2",
        }


def test_what_a_server_does_not_tell_is_none() -> None:
    with talking(bare) as (client, _):
        status = client.get_status()
    assert (status["is_ready"], status["server_load"], status["version"]) == (False, None, None)


def test_embeddings_come_in_the_order_of_the_texts() -> None:
    with talking(offering, default_embedding_model="e") as (client, server):
        assert client.embed(["a", "b"]) == [[1.0, 2.0], [3.0, 4.0]]
        client.embed("a", model="f")
    first, second = server.asked
    assert first == {"model": "e", "input": ["a", "b"]}
    assert second == {"model": "f", "input": ["a"]}


def test_a_server_without_embeddings_says_so() -> None:
    with (
        talking(bare) as (client, _),
        pytest.raises(ClientError, match="no embed") as caught,
    ):
        client.embed("a")
    assert (caught.value.code, caught.value.status) == (NOT_OFFERED, 404)


@pytest.mark.parametrize("num_read", [0, 1])
def test_a_closed_stream_is_at_its_end(told: Any, num_read: int) -> None:
    client, _ = told
    stream = client.generate("a", stream=True)
    for _ in range(num_read):
        next(stream)
    stream.close()
    assert list(stream) == []


class Person(msgspec.Struct):
    name: str
    age: int


def get_weather(city: str) -> dict[str, str]:
    """The weather of a city."""
    return {"city": city, "weather": "sunny"}


ADA = ('{"name":"Ada",', '"age":31}')


def test_a_type_of_the_answer_goes_out_as_its_schema_and_comes_back_as_a_value() -> None:
    with talking(telling(*ADA)) as (client, server):
        person = client.chat(ASK, response_format=Person).parsed
        assert client.generate("Ada", response_format=Person).parsed == person
    assert (person.name, person.age) == ("Ada", 31)
    schema = server.asked[0]["response_format"]["json_schema"]["schema"]
    assert schema["required"] == ["name", "age"]


def test_every_choice_and_the_end_of_a_stream_are_parsed() -> None:
    with talking(telling(*ADA)) as (client, _):
        assert client.chat(ASK, response_format=Person).choices[0].parsed == Person("Ada", 31)
        with client.chat(ASK, response_format=Person, stream=True) as stream:
            assert "".join(stream) == "".join(ADA)
        assert stream.parsed == Person("Ada", 31)


def test_an_answer_may_be_bound_to_choices() -> None:
    with talking(telling("yes")) as (client, server):
        assert client.chat(ASK, choices=["yes", "no"]) == "yes"
    assert server.asked[0]["structured_outputs"] == {"choice": ["yes", "no"]}


def test_tools_are_called_until_the_model_answers() -> None:
    with talking(calling(("get_weather", '{"city":"Paris"}'), ("get_weather", "{}"))) as pair:
        client, server = pair
        run = client.run_tools(ASK, tools=[get_weather], temperature=0)
    assert run.text.startswith('{"city": "Paris", "weather": "sunny"} Error: ')
    first, second = server.asked
    assert first["tools"][0]["function"]["name"] == "get_weather"
    assert (first["temperature"], second["temperature"]) == (0, 0)
    assert second["messages"] == run.messages[:-1]


def test_a_call_without_a_loop_leaves_the_tools_to_the_caller() -> None:
    with talking(calling(("get_weather", '{"city":"Paris"}'), reasoning="where?")) as (client, _):
        reply = client.chat(ASK, tools=[get_weather])
        with client.chat(ASK, tools=[get_weather], stream=True) as stream:
            assert "".join(stream) == ""
    assert reply.tool_calls[0].arguments == '{"city":"Paris"}'
    assert reply.reasoning == stream.reply.reasoning == "where?"
    assert stream.reply.tool_calls[0].arguments == reply.tool_calls[0].arguments
    assert stream.finish_reason == "tool_calls"


def test_a_mistake_in_a_tool_reaches_no_server() -> None:
    with talking(telling("x")) as (client, server):
        for tools in ([lambda: "sunny"], [get_weather, get_weather]):
            with pytest.raises(ClientError, match="name"):
                client.run_tools(ASK, tools=tools)
    assert server.asked == []


def test_the_answer_of_a_loop_has_a_form() -> None:
    async def script(call: Call) -> None:
        is_bound = "response_format" in call.json
        await (telling(*ADA) if is_bound else calling(("get_weather", '{"city":"Paris"}')))(call)

    with talking(script) as (client, server):
        run = client.run_tools(ASK, tools=[get_weather], response_format=Person)
    assert run.parsed == Person("Ada", 31)
    assert ["response_format" in asked for asked in server.asked] == [False, False, True]
    assert server.asked[-1]["tool_choice"] == "none"
