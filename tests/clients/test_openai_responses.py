"""openai-python's Responses API, in the installed version, against a served graph."""

import json
import typing

import pytest

openai = pytest.importorskip("openai")
pydantic = pytest.importorskip("pydantic")

QUESTION = "What is 23 + 45?"
KEY = "sk-of-the-tests"
SCHEMA = {
    "type": "object",
    "properties": {"city": {"type": "string", "enum": ["Paris", "Rome"]}},
    "required": ["city"],
    "additionalProperties": False,
}
TOOL = {"type": "function", "name": "get_weather", "parameters": SCHEMA, "strict": True}
OTHER = {**TOOL, "name": "get_time"}


class City(pydantic.BaseModel):
    city: typing.Literal["Paris", "Rome"]


@pytest.fixture
def client(url):
    with openai.OpenAI(base_url=f"{url}/v1", api_key=KEY, max_retries=0) as client:
        yield client


@pytest.fixture
def model(client):
    return client.models.list().data[0].id


@pytest.fixture
def options(model):
    return {"model": model, "input": QUESTION, "temperature": 0, "max_output_tokens": 256}


def test_a_response_is_made(client, options):
    answer = client.responses.create(**options, metadata={"a": "b"})
    assert answer.output_text.strip() == "68"
    assert (answer.status, answer.object, answer.error) == ("completed", "response", None)
    assert (answer.metadata, answer.temperature) == ({"a": "b"}, 0)
    usage = answer.usage
    assert usage.total_tokens == usage.input_tokens + usage.output_tokens
    type(answer).model_validate(answer.to_dict())


def test_items_and_instructions_are_the_conversation(client, options):
    messages = [
        {"role": "user", "content": [{"type": "input_text", "text": QUESTION}]},
        {"role": "assistant", "content": "68"},
        {"role": "user", "content": "What is 1 + 1?"},
    ]
    answer = client.responses.create(**{**options, "input": messages}, instructions="Be brief.")
    assert answer.output_text
    alone = client.responses.create(**options)
    assert answer.usage.input_tokens > alone.usage.input_tokens


def test_an_earlier_item_is_named_by_its_id(client, options):
    asked = {"role": "user", "content": QUESTION}
    first = client.responses.create(**options)
    said = {
        **options,
        "input": [asked, {"type": "item_reference", "id": first.output[0].id}, asked],
    }
    whole = {**options, "input": [asked, first.output[0].to_dict(), asked]}
    named, sent = client.responses.create(**said), client.responses.create(**whole)
    assert named.output_text == sent.output_text
    assert named.usage.input_tokens == sent.usage.input_tokens


def test_an_unknown_item_is_not_found(client, options):
    unknown = [{"type": "item_reference", "id": "msg_1"}]
    with pytest.raises(openai.NotFoundError, match="Send the item itself"):
        client.responses.create(**{**options, "input": unknown})


def test_the_tokens_of_the_input_are_counted(client, options):
    said = {"model": options["model"], "input": QUESTION, "tools": [TOOL], "instructions": "Hi."}
    counted = client.responses.input_tokens.count(**said)
    answer = client.responses.create(**said, max_output_tokens=1)
    assert counted.object == "response.input_tokens"
    assert counted.input_tokens == answer.usage.input_tokens > 9


def test_an_answer_that_is_cut_says_so(client, options):
    answer = client.responses.create(**{**options, "max_output_tokens": 1})
    assert (answer.status, answer.incomplete_details.reason) == ("incomplete", "max_output_tokens")


def test_the_events_of_a_stream(client, options):
    with client.responses.create(**options, stream=True) as stream:
        events = list(stream)
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert [events[0].type, events[-1].type] == ["response.created", "response.completed"]
    deltas = [event.delta for event in events if event.type == "response.output_text.delta"]
    assert "".join(deltas) == events[-1].response.output_text == "68"


def test_the_accumulated_stream_is_the_whole_response(client, options):
    whole = client.responses.create(**options)
    with client.responses.stream(**options) as stream:
        snapshots = [each.snapshot for each in stream if each.type == "response.output_text.delta"]
        final = stream.get_final_response()
    assert snapshots[-1] == final.output_text == whole.output_text
    assert final.usage.output_tokens == whole.usage.output_tokens


def test_a_schema_is_parsed(client, options):
    answer = client.responses.parse(**options, text_format=City)
    assert isinstance(answer.output_parsed, City)
    bound = {"format": {"type": "json_schema", "name": "city", "schema": SCHEMA, "strict": True}}
    answer = client.responses.create(**options, text=bound)
    assert json.loads(answer.output_text)["city"] in ("Paris", "Rome")


def test_a_parsed_stream_ends_with_the_object(client, options):
    with client.responses.stream(**options, text_format=City) as stream:
        final = stream.get_final_response()
    assert isinstance(final.output_parsed, City)


def test_a_function_is_called_and_its_output_answered(client, options):
    question = {"role": "user", "content": "What is the weather in Paris?"}
    called = {
        "tools": [TOOL, OTHER],
        "tool_choice": {"type": "function", "name": "get_weather"},
        "parallel_tool_calls": False,
    }
    first = client.responses.create(**{**options, "input": [question]}, **called)
    (call,) = [item for item in first.output if item.type == "function_call"]
    assert (call.name, call.status) == ("get_weather", "completed")
    assert json.loads(call.arguments)["city"] in ("Paris", "Rome")
    output = {"type": "function_call_output", "call_id": call.call_id, "output": "sunny"}
    second = client.responses.create(
        **{**options, "input": [question, *first.output, output]}, tools=[TOOL]
    )
    assert second.usage.input_tokens > first.usage.input_tokens


@pytest.mark.parametrize(
    "choice",
    [
        "required",
        {
            "type": "allowed_tools",
            "mode": "required",
            "tools": [{"type": "function", "name": "get_time"}],
        },
    ],
)
def test_a_streamed_call_accumulates(client, options, choice):
    called = {"tools": [TOOL, OTHER], "tool_choice": choice, "parallel_tool_calls": False}
    with client.responses.stream(**options, **called) as stream:
        events = list(stream)
        final = stream.get_final_response()
    call = final.output[0]
    pieces = [each for each in events if each.type == "response.function_call_arguments.delta"]
    assert pieces[-1].snapshot == call.arguments == "".join(each.delta for each in pieces)
    assert call.parsed_arguments["city"] in ("Paris", "Rome")
    assert choice == "required" or call.name == "get_time"


def test_logprobs_come_with_the_text(client, options):
    include = ["message.output_text.logprobs"]
    answer = client.responses.create(**options, include=include, top_logprobs=2)
    logprobs = answer.output[0].content[0].logprobs
    assert len(logprobs) == answer.usage.output_tokens
    assert all(len(one.top_logprobs) == 2 and one.logprob <= 0 for one in logprobs)


@pytest.mark.parametrize(
    ("wrong", "param"),
    [
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"background": True}, "background"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"input": []}, "input"),
        ({"temperature": -1}, "temperature"),
    ],
)
def test_a_wrong_request_is_a_bad_request(client, options, wrong, param):
    with pytest.raises(openai.BadRequestError) as error:
        client.responses.create(**{**options, **wrong})
    assert error.value.param == param


@pytest.mark.parametrize("method", ["retrieve", "delete", "cancel"])
def test_no_response_is_stored(client, options, method):
    answer = client.responses.create(**options)
    with pytest.raises(openai.NotFoundError):
        getattr(client.responses, method)(answer.id)
    with pytest.raises(openai.NotFoundError):
        client.responses.input_items.list(answer.id)


def test_a_client_that_leaves_ends_its_request(client, options, num_open):
    with client.responses.create(
        **{**options, "max_output_tokens": 1500},
        extra_body={"ignore_eos": True},
        stream=True,
    ) as stream:
        next(iter(stream))
    assert num_open() <= 1
