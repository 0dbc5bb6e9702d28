"""openai-python's tools and structured output, with its own helpers, against a served graph."""

import asyncio
import json
from typing import Literal

import pytest

openai = pytest.importorskip("openai")
pydantic = pytest.importorskip("pydantic")

KEY = "sk-of-the-tests"
ASKED = [{"role": "user", "content": "What is the weather in Paris?"}]
FIELDS = {"model": "sage-tiny", "messages": ASKED, "temperature": 0, "max_tokens": 256}


class Weather(pydantic.BaseModel):
    """The weather of a city."""

    city: Literal["Paris", "Rome"]


class Report(pydantic.BaseModel):
    """What is said about the weather."""

    city: Literal["Paris", "Rome"]
    is_dry: bool
    note: str | None = pydantic.Field(max_length=8)


WEATHER = openai.pydantic_function_tool(Weather, name="get_weather")
LOOSE = {  # as most frameworks write it: nothing says that there are no other arguments
    "type": "function",
    "function": {
        "name": "get_weather",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "enum": ["Paris", "Rome"]}},
            "required": ["city"],
        },
    },
}
MUST = {"tools": [WEATHER], "tool_choice": "required", "parallel_tool_calls": False}
SCHEMA = {
    "type": "json_schema",
    "json_schema": {
        "name": "report",
        "schema": {**Report.model_json_schema(), "additionalProperties": False},
        "strict": True,
    },
}


@pytest.fixture
def chats(url):
    with openai.OpenAI(base_url=f"{url}/v1", api_key=KEY, max_retries=0) as client:
        yield client.chat.completions


def arguments_of(message):
    (call,) = message.tool_calls
    assert call.id.startswith("call_")
    return json.loads(call.function.arguments)


@pytest.mark.parametrize("tool", [WEATHER, LOOSE], ids=["strict", "loose"])
def test_the_model_calls_a_tool_by_itself_and_reads_its_result(chats, tool):
    first = chats.create(**FIELDS, tools=[tool]).choices[0]
    assert first.finish_reason == "tool_calls"
    assert arguments_of(first.message) == {"city": "Paris"}
    result = {
        "role": "tool",
        "tool_call_id": first.message.tool_calls[0].id,
        "content": json.dumps({"weather": "rain"}),
    }
    history = [*ASKED, first.message, result]
    last = chats.create(**{**FIELDS, "messages": history}, tools=[tool]).choices[0]
    assert last.finish_reason == "stop"
    assert "rain" in last.message.content


def test_a_named_tool_is_called_once(chats):
    named = {"type": "function", "function": {"name": "get_weather"}}
    made = chats.create(**FIELDS, tools=[LOOSE], tool_choice=named).choices[0]
    assert arguments_of(made.message).keys() == {"city"}


def test_a_pydantic_tool_is_parsed(chats):
    message = chats.parse(**FIELDS, **MUST).choices[0].message
    assert isinstance(message.tool_calls[0].function.parsed_arguments, Weather)


@pytest.mark.parametrize("choice", ["auto", "required"])
def test_the_events_of_a_streamed_call(chats, choice):
    options = {**FIELDS, **MUST, "tool_choice": choice}
    with chats.stream(**options, stream_options={"include_usage": True}) as stream:
        events = list(stream)
        final = stream.get_final_completion()
    (call,) = final.choices[0].message.tool_calls
    deltas = [each for each in events if each.type == "tool_calls.function.arguments.delta"]
    (done,) = [each for each in events if each.type == "tool_calls.function.arguments.done"]
    assert "".join(each.arguments_delta for each in deltas) == call.function.arguments
    assert (done.name, done.arguments) == ("get_weather", call.function.arguments)
    assert isinstance(call.function.parsed_arguments, Weather)
    assert final.usage.completion_tokens > 0


def test_a_schema_is_parsed_whole_and_streamed(chats):
    whole = chats.parse(**FIELDS, response_format=Report).choices[0].message.parsed
    with chats.stream(**FIELDS, response_format=Report) as stream:
        (done,) = [each for each in stream if each.type == "content.done"]
    assert isinstance(whole, Report)
    assert done.parsed == whole


def test_a_call_that_was_cut_off_goes_round(chats):
    """Agents send it back with the error, and ask again."""
    cut = chats.create(**{**FIELDS, "max_tokens": 48}, tools=[WEATHER], tool_choice="required")
    assert cut.choices[0].finish_reason == "length"
    message = cut.choices[0].message
    message.tool_calls[0].function.arguments = '{"city": "Pa'
    failed = [
        {"role": "tool", "tool_call_id": call.id, "content": "no JSON"}
        for call in message.tool_calls
    ]
    history = [*ASKED, message, *failed]
    assert chats.create(**{**FIELDS, "messages": history}, tools=[WEATHER]).choices[0].message


@pytest.mark.filterwarnings("ignore:Pydantic serializer warnings")
def test_what_the_client_parsed_goes_round(chats):
    called = chats.parse(**FIELDS, **MUST).choices[0].message
    told = chats.parse(**FIELDS, response_format=Report).choices[0].message
    result = {"role": "tool", "tool_call_id": called.tool_calls[0].id, "content": "rain"}
    history = [*ASKED, told, *ASKED, called, result]
    last = chats.create(**{**FIELDS, "messages": history}, tools=[WEATHER]).choices[0].message
    assert "rain" in last.content


def test_an_answer_beside_a_tool_is_a_call_or_has_the_form(chats):
    """What agents send in each turn: tools, and the form of the last answer."""
    asked = chats.parse(**FIELDS, tools=[WEATHER], response_format=Report).choices[0].message
    assert asked.tool_calls or asked.parsed
    other = {**FIELDS, "messages": [{"role": "user", "content": "What is 23 + 45?"}]}
    told = chats.parse(**other, tools=[WEATHER], response_format=Report).choices[0].message
    assert told.tool_calls or told.parsed


def test_each_choice_obeys_the_schema(chats):
    options = {**FIELDS, "temperature": 1.0, "n": 2}
    answer = chats.create(**options, response_format=SCHEMA)
    assert len(answer.choices) == 2
    for choice in answer.choices:
        Report.model_validate_json(choice.message.content)


def test_an_object_without_a_schema(chats):
    answer = chats.create(**FIELDS, response_format={"type": "json_object"}).choices[0]
    if answer.finish_reason == "stop":
        assert isinstance(json.loads(answer.message.content), dict)
    else:
        assert answer.message.content.lstrip().startswith("{")


@pytest.mark.parametrize(
    ("bound", "answers"),
    [
        ({"choice": ["red", "blue"]}, ["red", "blue"]),
        ({"regex": "a{3}|b{3}"}, ["aaa", "bbb"]),
        ({"grammar": 'start: "yes" | "no"'}, ["yes", "no"]),
        ({"json": {"enum": ["x", 1]}}, ['"x"', "1"]),
    ],
)
def test_the_ways_of_vllm_to_bind_an_answer(chats, bound, answers):
    made = chats.create(**FIELDS, extra_body={"structured_outputs": bound}).choices[0]
    assert made.message.content in answers


@pytest.mark.parametrize("effort", ["none", "low", "high"])
def test_a_model_that_does_not_reason_takes_an_effort(chats, effort):
    made = chats.create(**FIELDS, reasoning_effort=effort, tools=[WEATHER]).choices[0]
    assert made.message.tool_calls
    assert getattr(made.message, "reasoning_content", None) is None


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        (
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "x", "schema": {"type": "strnig"}},
                }
            },
            "response_format.json_schema.schema",
        ),
        (
            {
                "tools": [
                    {
                        "type": "function",
                        "function": {"name": "x", "parameters": {"$ref": "#/nowhere"}},
                    }
                ],
                "tool_choice": "required",
            },
            "tools[0].function.parameters",
        ),
        ({"extra_body": {"structured_outputs": {"regex": "["}}}, "structured_outputs.regex"),
    ],
)
def test_a_schema_that_is_wrong_is_named(chats, fields, param):
    with pytest.raises(openai.BadRequestError) as error:
        chats.create(**FIELDS, **fields)
    assert (error.value.param, error.value.code) == (param, "invalid_grammar")


def test_the_async_client(url):
    async def ask():
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key=KEY) as client:
            chats = client.chat.completions
            async with chats.stream(**FIELDS, **MUST) as stream:
                streamed = await stream.get_final_completion()
            parsed = await chats.parse(**FIELDS, response_format=Weather)
            return streamed.choices[0].message, parsed.choices[0].message.parsed

    called, parsed = asyncio.run(ask())
    assert arguments_of(called).keys() == {"city"}
    assert isinstance(parsed, Weather)
