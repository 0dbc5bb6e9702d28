"""LiteLLM as a library: its providers for servers such as this one, and its own APIs above them."""

import asyncio
import json
import os

import pytest

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # else it looks for prices when imported
litellm = pytest.importorskip("litellm")

KEY = "sk-of-the-tests"
QUESTION = [{"role": "user", "content": "What is 23 + 45?"}]
ASKED = [{"role": "user", "content": "What is the weather in Paris?"}]
SCHEMA = {
    "type": "object",
    "properties": {"city": {"type": "string", "enum": ["Paris", "Rome"]}},
    "required": ["city"],
    "additionalProperties": False,
}
FUNCTION = {"name": "get_weather", "description": "The weather of a city.", "parameters": SCHEMA}
TOOL = {"type": "function", "function": FUNCTION}
FORM = {"type": "json_schema", "json_schema": {"name": "place", "schema": SCHEMA, "strict": True}}


@pytest.fixture(params=["openai", "hosted_vllm", "anthropic"])
def server(request, url):
    """The fields that name the server, for each provider that has its API."""
    base = url if request.param == "anthropic" else f"{url}/v1"
    return {"model": f"{request.param}/sage-tiny", "api_base": base, "api_key": KEY}


def complete(server, **fields):
    return litellm.completion(
        **{**server, "messages": ASKED, "temperature": 0, "max_tokens": 256, **fields}
    )


def test_a_chat_is_answered(server):
    answer = complete(server, messages=QUESTION)
    assert answer.choices[0].message.content.strip() == "68"
    assert answer.usage.completion_tokens > 0


def test_a_tool_is_called_and_its_result_read(server):
    first = complete(server, tools=[TOOL]).choices[0]
    (call,) = first.message.tool_calls
    assert first.finish_reason == "tool_calls"
    assert json.loads(call.function.arguments) == {"city": "Paris"}
    result = {"role": "tool", "tool_call_id": call.id, "content": "rain"}
    last = complete(server, messages=[*ASKED, first.message, result], tools=[TOOL]).choices[0]
    assert "rain" in last.message.content


@pytest.mark.parametrize(
    "choice", ["required", {"type": "function", "function": {"name": "get_weather"}}]
)
def test_a_streamed_call_adds_up(server, choice):
    chunks = list(complete(server, tools=[TOOL], tool_choice=choice, stream=True))
    made = litellm.stream_chunk_builder(chunks).choices[0]
    assert made.finish_reason == "tool_calls"
    for call in made.message.tool_calls:
        assert json.loads(call.function.arguments)["city"] in ("Paris", "Rome")


def test_an_answer_has_the_form_of_a_schema(server):
    answer = complete(server, response_format=FORM)
    assert json.loads(answer.choices[0].message.content)["city"] in ("Paris", "Rome")


def test_a_form_stands_beside_tools(server):
    made = complete(server, tools=[TOOL], response_format=FORM).choices[0].message
    assert made.tool_calls or json.loads(made.content)["city"] in ("Paris", "Rome")


def test_responses_are_made(server):
    answer = litellm.responses(**server, input=QUESTION[0]["content"], temperature=0)
    assert answer.output_text.strip() == "68"
    events = list(litellm.responses(**server, input="What is 1 + 1?", temperature=0, stream=True))
    assert events[-1].type == "response.completed"


def test_messages_are_made(server):
    """The Anthropic API of LiteLLM: to a server without it, it sends chats or responses."""
    tool = {"name": "get_weather", "input_schema": SCHEMA}
    fields = {"messages": ASKED, "max_tokens": 256, "tools": [tool], "temperature": 0}

    async def ask():
        whole = await litellm.anthropic.messages.acreate(**server, **fields)
        stream = await litellm.anthropic.messages.acreate(**server, **fields, stream=True)
        return whole, b"".join([piece async for piece in stream])

    whole, streamed = asyncio.run(ask())
    (use,) = [block for block in whole["content"] if block["type"] == "tool_use"]
    assert (use["name"], use["input"]) == ("get_weather", {"city": "Paris"})
    assert b"input_json_delta" in streamed
    assert b"message_stop" in streamed


def test_what_is_wrong_is_a_bad_request(server):
    with pytest.raises(litellm.BadRequestError) as error:
        complete(server, temperature=-1)
    assert "temperature: is -1" in str(error.value)
    with pytest.raises(litellm.ContextWindowExceededError):
        complete(server, messages=[{"role": "user", "content": "x" * 99_999}])
    with pytest.raises(litellm.NotFoundError):
        complete({**server, "model": server["model"] + "-2"})
