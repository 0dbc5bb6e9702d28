"""anthropic-sdk-python against a served graph; skipped without it."""

import asyncio
import json
from typing import Literal

import pytest

anthropic = pytest.importorskip("anthropic")
pydantic = pytest.importorskip("pydantic")

QUESTION = [{"role": "user", "content": "What is 23 + 45?"}]
KEY = "sk-of-the-tests"
MODEL = "sage-tiny"
WEATHER = {
    "name": "get_weather",
    "description": "The weather of a city.",
    "input_schema": {
        "type": "object",
        "properties": {"city": {"type": "string", "enum": ["Paris", "Rome"]}},
        "required": ["city"],
        "additionalProperties": False,
    },
}
ASKED = [{"role": "user", "content": "What is the weather in Paris?"}]
ONE_CALL = {"type": "any", "disable_parallel_tool_use": True}


@pytest.fixture
def client(url):
    with anthropic.Anthropic(base_url=url, api_key=KEY, max_retries=0) as client:
        yield client


def fields(**more):
    """The arguments of a call. This client has no `temperature`, which is a field of the API."""
    body = {"temperature": 0, **more.pop("extra_body", {})}
    return {"model": MODEL, "max_tokens": 64, "messages": QUESTION, "extra_body": body, **more}


def calls(**more):
    """The fields of a request whose answer is one call."""
    said = {"messages": ASKED, "tools": [WEATHER], "tool_choice": ONE_CALL, "max_tokens": 128}
    return fields(**{**said, **more})


def test_a_question_is_answered(client):
    answer = client.messages.create(**fields())
    assert (answer.type, answer.role, answer.model) == ("message", "assistant", MODEL)
    (block,) = answer.content
    assert (block.type, block.text.strip()) == ("text", "68")
    assert (answer.stop_reason, answer.stop_sequence) == ("end_turn", None)
    assert answer.usage.input_tokens + answer.usage.cache_read_input_tokens > 0
    assert answer.usage.output_tokens > 0
    assert answer._request_id


def test_a_stream_adds_up_to_the_message(client):
    whole = client.messages.create(**fields())
    with client.messages.stream(**fields()) as stream:
        text = "".join(stream.text_stream)
        message = stream.get_final_message()
    assert text == message.content[0].text == whole.content[0].text
    assert message.stop_reason == "end_turn"
    assert message.usage.output_tokens == whole.usage.output_tokens


def test_raw_events_are_in_their_order(client):
    kinds = [event.type for event in client.messages.create(**fields(stream=True))]
    assert kinds[:2] == ["message_start", "content_block_start"]
    assert kinds[-3:] == ["content_block_stop", "message_delta", "message_stop"]
    assert set(kinds[2:-3]) == {"content_block_delta"}


def test_a_system_prompt_a_prefill_and_a_stop_sequence(client):
    system = [{"type": "text", "text": "Be brief.", "cache_control": {"type": "ephemeral"}}]
    prefilled = [*QUESTION, {"role": "assistant", "content": "6"}]
    answer = client.messages.create(**fields(messages=prefilled))
    assert answer.content[0].text == "8"
    answer = client.messages.create(**fields(stop_sequences=["8"]))
    assert answer.content[0].text.strip() == "6"
    assert (answer.stop_reason, answer.stop_sequence) == ("stop_sequence", "8")
    assert client.messages.create(**fields(system=system, max_tokens=1)).stop_reason


def test_an_answer_may_ask_for_more_than_the_context_holds(client):
    answer = client.messages.create(**fields(max_tokens=64_000), timeout=60)
    assert answer.content[0].text.strip() == "68"


def test_a_tool_is_called_and_its_result_taken(client):
    answer = client.messages.create(**calls())
    (use,) = answer.content
    assert (answer.stop_reason, use.type, use.name) == ("tool_use", "tool_use", "get_weather")
    assert use.id.startswith("toolu_")
    assert use.input["city"] in ("Paris", "Rome")
    result = {"type": "tool_result", "tool_use_id": use.id, "content": "rain", "is_error": False}
    turns = [*ASKED, answer.to_param(), {"role": "user", "content": [result]}]
    last = client.messages.create(**fields(messages=turns, tools=[WEATHER], max_tokens=32))
    assert last.stop_reason in ("end_turn", "max_tokens", "tool_use")
    assert last.usage.input_tokens + last.usage.cache_read_input_tokens > answer.usage.input_tokens


def test_the_model_calls_a_tool_by_itself_and_reads_the_result(client):
    said = fields(messages=ASKED, tools=[WEATHER], max_tokens=128)
    with client.messages.stream(**said) as stream:
        answer = stream.get_final_message()
    (use,) = answer.content
    assert (answer.stop_reason, use.name, use.input) == (
        "tool_use",
        "get_weather",
        {"city": "Paris"},
    )
    result = {"type": "tool_result", "tool_use_id": use.id, "content": "rain, 12 degrees"}
    turns = [*ASKED, answer.to_param(), {"role": "user", "content": [result]}]
    last = client.messages.create(**{**said, "messages": turns})
    assert last.stop_reason == "end_turn"
    assert "12" in last.content[0].text


def test_a_streamed_call_adds_up_to_the_call(client):
    whole = client.messages.create(**calls()).content[0]
    with client.messages.stream(**calls()) as stream:
        pieces = [event.partial_json for event in stream if event.type == "input_json"]
        message = stream.get_final_message()
    (use,) = message.content
    assert json.loads("".join(pieces)) == use.input == whole.input
    assert message.stop_reason == "tool_use"


def test_a_call_that_is_cut_off_has_an_empty_input(client):
    answer = client.messages.create(**calls(max_tokens=40))
    assert answer.stop_reason == "max_tokens"
    assert all(block.input == {} for block in answer.content if block.type == "tool_use")


class Place(pydantic.BaseModel):
    city: Literal["Paris", "Rome"]


def test_an_answer_obeys_a_schema(client):
    answer = client.messages.parse(**fields(messages=ASKED), output_format=Place)
    assert answer.parsed_output.city in ("Paris", "Rome")
    with client.messages.stream(**fields(messages=ASKED), output_format=Place) as stream:
        assert stream.get_final_message().parsed_output == answer.parsed_output


def test_tokens_are_counted(client):
    counted = client.messages.count_tokens(model=MODEL, messages=QUESTION)
    usage = client.messages.create(**fields()).usage
    assert counted.input_tokens == usage.input_tokens + usage.cache_read_input_tokens
    told = client.messages.count_tokens(
        model=MODEL, messages=QUESTION, system="Be brief.", tools=[WEATHER]
    )
    assert told.input_tokens > counted.input_tokens


def test_the_async_client(url):
    async def ask():
        async with anthropic.AsyncAnthropic(base_url=url, auth_token=KEY) as client:
            async with client.messages.stream(**fields()) as stream:
                text = "".join([piece async for piece in stream.text_stream])
            counted = await client.messages.count_tokens(model=MODEL, messages=QUESTION)
            return text, counted.input_tokens

    text, number = asyncio.run(ask())
    assert text.strip() == "68"
    assert number > 0


def test_the_beta_client_and_its_tool_runner(client):
    ran = []

    @anthropic.beta_tool
    def get_weather(city: Literal["Paris", "Rome"]) -> str:
        """The weather of a city.

        Args:
            city: The city.
        """
        ran.append(city)
        return "rain"

    runner = client.beta.messages.tool_runner(**calls(tools=[get_weather], max_iterations=2))
    assert [message.stop_reason for message in runner] == ["tool_use"] * 2
    assert len(ran) >= 1


IMAGE = {"type": "image", "source": {"type": "url", "url": "http://127.0.0.1/a.png"}}
SEARCH = {"type": "web_search_20250305", "name": "web_search"}


@pytest.mark.parametrize(
    ("more", "named"),
    [
        ({"extra_body": {"temperature": -1}}, "temperature"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "user", "content": [IMAGE]}]}, "messages[0].content[0].type"),
        ({"tools": [SEARCH]}, "tools[0].type"),
        ({"tool_choice": {"type": "any"}}, "tool_choice"),
        ({"stop_sequences": ["x"] * 99}, "stop_sequences"),
        ({"messages": [{"role": "user", "content": "x" * 99_999}]}, "prompt is too long"),
        ({"extra_body": {"container": "c"}}, "container"),
    ],
)
def test_what_is_wrong_is_refused_by_name(client, more, named):
    with pytest.raises(anthropic.BadRequestError) as error:
        client.messages.create(**fields(**more))
    assert named in error.value.api_message
    assert error.value.type == "invalid_request_error"
    assert error.value.request_id == error.value.body["request_id"]


def test_errors_are_those_of_the_client(client, url):
    with pytest.raises(anthropic.NotFoundError) as error:
        client.messages.create(**fields(model="no-such-model"))
    assert error.value.type == "not_found_error"
    with anthropic.Anthropic(base_url=url, api_key="wrong", max_retries=0) as wrong:
        with pytest.raises(anthropic.AuthenticationError) as error:
            wrong.messages.create(**fields())
        assert error.value.type == "authentication_error"
        with pytest.raises(anthropic.AuthenticationError):
            wrong.messages.count_tokens(model=MODEL, messages=QUESTION)
