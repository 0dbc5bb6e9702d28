"""A body of /v1/responses becomes the chat that it asks for, and the chat's errors come back."""

from typing import Any

import pytest

from sagellm.gateway.api_errors import ApiError, wrong
from sagellm.gateway.item_memory import ItemMemory, ReferencedItems
from sagellm.gateway.protocol.bodies import convert
from sagellm.gateway.protocol.responses_chat import chat_of
from sagellm.gateway.protocol.responses_fields import ResponsesRequest

FUNCTION = {"name": "f", "parameters": {"type": "object"}}
TOOL = {"type": "function", **FUNCTION}
OTHER = {"type": "function", "name": "g"}
CALL = {"type": "function_call", "call_id": "c1", "name": "f", "arguments": "{}"}
AS_CALL = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
OUTPUT = {"type": "function_call_output", "call_id": "c1", "output": "5"}
THOUGHT = {"type": "reasoning", "content": [{"type": "reasoning_text", "text": "hm"}]}
USER = {"type": "message", "role": "user", "content": "hi"}
SAID = {
    "type": "message",
    "role": "assistant",
    "content": [{"type": "output_text", "text": "so "}, {"type": "refusal", "refusal": "no"}],
}


def made(**body: Any) -> Any:
    find = ReferencedItems(ItemMemory(), "t", 0)
    return chat_of(convert({"input": "hi", **body}, ResponsesRequest), find)


def messages(*items: Any) -> Any:
    return made(input=list(items)).body["messages"]


def test_a_text_is_the_users_message_and_instructions_stand_before_it():
    assert made(instructions="be brief").body == {
        "messages": [
            {"role": "system", "content": "be brief"},
            {"role": "user", "content": "hi"},
        ]
    }


def test_parts_are_joined_in_every_role():
    parts = [{"type": "input_text", "text": "a"}, {"type": "input_text", "text": "b"}]
    for role in ("user", "system", "developer"):
        message = {"type": "message", "role": role, "content": parts}
        assert messages(message) == [{"role": role, "content": "ab"}]
    assert messages(SAID) == [{"role": "assistant", "content": "so no"}]


def test_reasoning_text_and_calls_of_one_turn_are_one_message():
    second = {**CALL, "call_id": "c2"}
    found = messages(USER, THOUGHT, SAID, CALL, second, OUTPUT)
    assert found[1] == {
        "role": "assistant",
        "content": "so no",
        "reasoning_content": "hm",
        "tool_calls": [AS_CALL, {**AS_CALL, "id": "c2"}],
    }
    assert found[2] == {"role": "tool", "content": "5", "tool_call_id": "c1"}
    assert len(found) == 3


@pytest.mark.parametrize(
    ("items", "num"),
    [((SAID, SAID), 2), ((CALL, SAID), 2), ((CALL, THOUGHT), 2), ((CALL, OUTPUT, CALL), 3)],
)
def test_what_cannot_be_one_turn_begins_another(items, num):
    assert len(messages(*items)) == num


def test_the_output_of_a_call_may_have_parts():
    parts = [{"type": "input_text", "text": "4"}, {"type": "input_text", "text": "2"}]
    assert messages({**OUTPUT, "output": parts})[0]["content"] == "42"


def test_a_summary_stands_for_reasoning_without_content():
    item = {"type": "reasoning", "summary": [{"type": "summary_text", "text": "in short"}]}
    assert messages(item)[0]["reasoning_content"] == "in short"


def test_flat_tools_become_nested_ones():
    assert made(tools=[TOOL]).body["tools"] == [{"type": "function", "function": FUNCTION}]


@pytest.mark.parametrize("choice", ["auto", "none", "required"])
def test_a_mode_of_choice_goes_through(choice):
    assert made(tools=[TOOL], tool_choice=choice).body["tool_choice"] == choice


def test_a_named_function_is_nested():
    body = made(tools=[TOOL], tool_choice={"type": "function", "name": "f"}).body
    assert body["tool_choice"] == {"type": "function", "function": {"name": "f"}}


def test_allowed_tools_are_nested_twice():
    named = {"type": "function", "name": "g"}
    allowed = {"type": "allowed_tools", "mode": "required", "tools": [named]}
    assert made(tools=[TOOL, OTHER], tool_choice=allowed).body["tool_choice"] == {
        "type": "allowed_tools",
        "allowed_tools": {
            "mode": "required",
            "tools": [{"type": "function", "function": {"name": "g"}}],
        },
    }


@pytest.mark.parametrize(
    ("form", "expected"),
    [
        ({"type": "text"}, {"type": "text"}),
        ({"type": "json_object"}, {"type": "json_object"}),
        (
            {"type": "json_schema", "name": "n", "schema": {"type": "object"}, "strict": True},
            {
                "type": "json_schema",
                "json_schema": {"name": "n", "schema": {"type": "object"}, "strict": True},
            },
        ),
    ],
)
def test_the_form_of_the_text_is_the_response_format(form, expected):
    assert made(text={"format": form}).body["response_format"] == expected


def test_the_other_options_have_other_names():
    body = made(
        include=["message.output_text.logprobs"],
        truncation="auto",
        reasoning={"effort": "low", "summary": "auto"},
    ).body
    assert body["logprobs"] is True
    assert body["truncate_prompt_tokens"] == -1
    assert body["reasoning_effort"] == "low"


@pytest.mark.parametrize(
    ("param", "place"),
    [
        ("messages", "input"),
        ("messages[0].content", "instructions"),
        ("messages[1].content", "input[0].content"),
        ("messages[2].tool_calls[0].function.arguments", "input[2].arguments"),
        ("messages[2].content", "input[1].content"),
        ("messages[3].content", "input[3].output"),
        ("tools[0].function.parameters", "tools[0].parameters"),
        ("tool_choice.function.name", "tool_choice.name"),
        ("response_format.json_schema.schema", "text.format.schema"),
        ("max_completion_tokens", "max_output_tokens"),
        ("stop[3]", "stop[3]"),
    ],
)
def test_an_error_names_the_field_of_this_api(param, place):
    found = made(input=[USER, SAID, CALL, OUTPUT], instructions="x", tools=[TOOL])
    error = found.renamed(wrong(param, "is 5, more than max_tokens (4)"))
    assert error.param == place
    assert error.message == f"{place}: is 5, more than max_output_tokens (4)"


def test_other_fields_in_an_error_have_their_names_here_too():
    error = made().renamed(wrong("regex", "stands beside response_format; give one"))
    assert error.message == "regex: stands beside text.format; give one"


def test_an_error_without_a_field_stays():
    error = ApiError(400, "the body is not valid JSON")
    assert made().renamed(error) is error
