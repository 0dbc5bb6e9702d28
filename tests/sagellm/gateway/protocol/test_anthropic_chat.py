"""The chat that a body of /v1/messages asks for, and the errors of that chat."""

import json
from typing import Any

import pytest

from sagellm.gateway.api_errors import ApiError, wrong
from sagellm.gateway.protocol.anthropic_body import read_messages_body
from sagellm.gateway.protocol.anthropic_chat import ChatOfMessages, chat_of
from sagellm.gateway.protocol.bodies import ChatRequest
from sagellm.gateway.settings import RequestLimits

LIMITS = RequestLimits()
USER = {"role": "user", "content": "hi"}
TOOL = {"name": "f", "description": "d", "input_schema": {"type": "object"}}
CALL = {"type": "tool_use", "id": "toolu_1", "name": "f", "input": {"x": "ä"}}
RESULT = {"type": "tool_result", "tool_use_id": "toolu_1", "content": "2"}


def chat(*messages: Any, **fields: Any) -> ChatOfMessages:
    said = {"max_tokens": 5, "messages": messages or [USER], **fields}
    return chat_of(read_messages_body(json.dumps(said).encode(), LIMITS))


def text(content: str) -> dict[str, Any]:
    return {"type": "text", "text": content}


def says(role: str, content: str, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


def call(**function: Any) -> dict[str, Any]:
    return {"id": "toolu_1", "type": "function", "function": {"name": "f", **function}}


CALLED = call(arguments='{"x": "ä"}')
ANSWERED = says("tool", "2", tool_call_id="toolu_1")


@pytest.mark.parametrize(
    ("messages", "expected"),
    [
        ([USER], [says("user", "hi")]),
        ([says("user", [text("a"), text("b")])], [says("user", "a\nb")]),
        ([USER, says("user", "b")], [says("user", "hi\nb")]),
        ([says("user", [])], [says("user", "")]),
        ([says("system", "s"), USER], [says("system", "s"), says("user", "hi")]),
        (
            [USER, says("assistant", [text("a"), text("b")])],
            [says("user", "hi"), says("assistant", "ab")],
        ),
        (
            [says("assistant", [{"type": "thinking", "thinking": "t", "signature": "s"}]), USER],
            [says("assistant", "", reasoning_content="t"), says("user", "hi")],
        ),
        (
            [says("assistant", [{"type": "redacted_thinking", "data": "d"}, text("a")]), USER],
            [says("assistant", "a"), says("user", "hi")],
        ),
        (
            [says("assistant", [text("a"), CALL]), says("user", [RESULT, text("so?")])],
            [
                says("assistant", "a", tool_calls=[CALLED]),
                {**ANSWERED, "name": "f"},
                says("user", "so?"),
            ],
        ),
        (
            [says("user", [{**RESULT, "content": [text("a"), text("b")], "is_error": True}])],
            [{**ANSWERED, "content": "Error: a\nb"}],
        ),
        (
            [says("user", [{"type": "tool_result", "tool_use_id": "toolu_1"}])],
            [{**ANSWERED, "content": ""}],
        ),
    ],
)
def test_messages_become_those_of_a_chat(messages: list[Any], expected: list[Any]) -> None:
    assert chat(*messages).body["messages"] == expected


@pytest.mark.parametrize("system", ["a\nb", [text("a"), text("b")]])
def test_the_system_prompt_comes_first(system: Any) -> None:
    assert chat(system=system).body["messages"] == [says("system", "a\nb"), says("user", "hi")]


def test_a_final_message_of_the_assistant_goes_on() -> None:
    assert chat(USER, says("assistant", "The")).read(LIMITS).continue_final_message
    assert not chat().read(LIMITS).continue_final_message


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"model": "m"}, {"model": "m"}),
        ({"stop_sequences": ["a"]}, {"stop": ["a"]}),
        ({"top_k": 3, "top_p": 0.5}, {"top_k": 3, "top_p": 0.5}),
        ({"temperature": 0}, {"temperature": 0}),
        ({"stream": True}, {"stream": True}),
        ({"metadata": {"user_id": "u"}}, {"user": "u"}),
        (
            {"thinking": {"type": "disabled"}},
            {"chat_template_kwargs": {"enable_thinking": False, "thinking": False}},
        ),
        (
            {"thinking": {"type": "enabled", "budget_tokens": 9}},
            {"chat_template_kwargs": {"enable_thinking": True, "thinking": True}},
        ),
        ({"output_config": {"effort": "low"}}, {"reasoning_effort": "low"}),
    ],
)
def test_fields_become_those_of_a_chat(fields: dict[str, Any], expected: dict[str, Any]) -> None:
    made = chat(**fields)
    assert {name: made.body[name] for name in expected} == expected
    assert isinstance(made.read(LIMITS), ChatRequest)


def test_the_calls_of_successive_messages_are_bounded_together() -> None:
    call = {"type": "tool_use", "id": "c", "name": "f", "input": {}}
    turn = {"role": "assistant", "content": [call] * 600}
    with pytest.raises(ApiError, match="has 1200 tool calls") as caught:
        chat(turn, turn, USER)
    assert caught.value.message.startswith("messages[0].content[0]: ")


def test_the_limit_of_tokens_is_no_field_of_the_chat() -> None:
    assert chat().read(LIMITS).asked_tokens is None


NAMED = {"type": "function", "function": {"name": "f"}}


@pytest.mark.parametrize(
    ("choice", "mode", "is_parallel"),
    [
        ({"type": "auto"}, "auto", True),
        ({"type": "any"}, "required", True),
        ({"type": "none"}, "none", True),
        ({"type": "tool", "name": "f"}, NAMED, True),
        ({"type": "auto", "disable_parallel_tool_use": True}, "auto", False),
    ],
)
def test_tools_become_functions(choice: Any, mode: Any, is_parallel: bool) -> None:
    body = chat(tools=[TOOL], tool_choice=choice).body
    function = {"name": "f", "description": "d", "parameters": {"type": "object"}}
    assert body["tools"] == [{"type": "function", "function": function}]
    assert (body["tool_choice"], body["parallel_tool_calls"]) == (mode, is_parallel)


SCHEMA = {"type": "json_schema", "schema": {"type": "object"}}


@pytest.mark.parametrize(
    ("fields", "place"),
    [
        ({"output_format": SCHEMA}, "output_format"),
        ({"output_config": {"format": SCHEMA}}, "output_config.format"),
    ],
)
def test_a_schema_of_the_answer_becomes_a_response_format(fields: Any, place: str) -> None:
    made = chat(**fields)
    schema = {"name": "answer", "schema": {"type": "object"}, "strict": True}
    assert made.body["response_format"] == {"type": "json_schema", "json_schema": schema}
    error = made.renamed(wrong("response_format.json_schema.schema", "is too deep"))
    assert error.message == f"{place}.schema: is too deep"


CONVERSATION = [USER, says("assistant", [text("a"), CALL]), says("user", [RESULT, text("b")])]


@pytest.mark.parametrize(
    ("param", "place"),
    [
        ("messages", "messages"),
        ("messages[0].content", "system"),
        ("messages[1].content", "messages[0].content"),
        ("messages[2].tool_calls[0].function.arguments", "messages[1].content[1].input"),
        ("messages[2].tool_calls[0].function.name", "messages[1].content[1].name"),
        ("messages[3].content", "messages[2].content[0].content"),
        ("messages[4].role", "messages[2].content[1].role"),
        ("tools[0].function.name", "tools[0].name"),
        ("tools[0].function.parameters.type", "tools[0].input_schema.type"),
        ("tool_choice.function.name", "tool_choice.name"),
        ("stop", "stop_sequences"),
        ("user", "metadata.user_id"),
        ("temperature", "temperature"),
    ],
)
def test_errors_name_the_fields_of_this_api(param: str, place: str) -> None:
    made = chat(*CONVERSATION, system="s", tools=[TOOL])
    error = made.renamed(wrong(param, "is wrong", "a_code"))
    assert (error.param, error.code) == (place, "a_code")
    assert error.message == f"{place}: is wrong"


def test_an_error_without_a_field_stays_as_it_is() -> None:
    error = ApiError(503, "busy", retry_after_s=2.0, should_retry=True)
    with pytest.raises(ApiError) as caught, chat().naming():
        raise error
    assert caught.value.message == "busy"
    assert (caught.value.retry_after_s, caught.value.should_retry) == (2.0, True)


def test_a_long_prompt_is_told_in_the_words_that_agents_look_for() -> None:
    error = chat().renamed(wrong("messages", "has 70 tokens", "context_length_exceeded"))
    assert error.message == "prompt is too long: messages: has 70 tokens"


def test_the_depth_of_the_translation_is_not_counted_against_the_client() -> None:
    schema: Any = {}
    for _ in range(LIMITS.json_depth - 4):
        schema = {"not": schema}
    made = chat(tools=[{"name": "f", "input_schema": schema}], tool_choice={"type": "auto"})
    assert made.read(LIMITS).tools
