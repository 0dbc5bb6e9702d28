"""Tools, calls, variables and messages that go on: what a chat may say of how it is rendered."""

import json
from typing import Any

import pytest

from sagellm.gateway.api_errors import ApiError
from sagellm.gateway.protocol.bodies import ChatRequest, read_chat
from sagellm.gateway.protocol.chat_messages import rendering_of
from sagellm.gateway.settings import RequestLimits
from sagellm.runtime.models.chat import RESERVED_VARIABLES, Rendering

USER = {"role": "user", "content": "hi"}
SECRET = "the-prompt-nobody-may-see"
TOOL = {
    "type": "function",
    "function": {"name": "f", "description": "d", "parameters": {"type": "object"}},
}


def read(*messages: Any, **fields: Any) -> ChatRequest:
    return read_chat(
        json.dumps({"messages": messages or [USER], **fields}).encode(), RequestLimits()
    )


def refusal(*messages: Any, **fields: Any) -> ApiError:
    with pytest.raises(ApiError) as caught:
        read(*messages, **fields)
    assert caught.value.status == 400
    assert SECRET not in caught.value.message
    return caught.value


def call(arguments: Any = "{}", **fields: Any) -> dict[str, Any]:
    return {
        "id": "c1",
        "type": "function",
        "function": {"name": "f", "arguments": arguments},
        **fields,
    }


def calling(*calls: Any, **fields: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": None, "tool_calls": list(calls), **fields}


@pytest.mark.parametrize("choice", [None, "none", "auto"])
@pytest.mark.parametrize("tools", [None, []])
def test_no_tools_are_a_plain_chat(tools: Any, choice: Any) -> None:
    assert rendering_of(read(tools=tools, tool_choice=choice), frozenset()) == Rendering()


@pytest.mark.parametrize("choice", ["none", "auto", "required", None])
def test_tools_are_shown_unless_none_may_be_called(choice: Any) -> None:
    asked = read(tools=[TOOL], tool_choice=choice, parallel_tool_calls=False)
    assert rendering_of(asked, frozenset()).tools == (() if choice == "none" else (TOOL,))


@pytest.mark.parametrize(
    ("tools", "param"),
    [
        ([{}], "tools[0].type"),
        ([{**TOOL, "type": SECRET}], "tools[0].type"),
        ([{"type": "function", "function": {}}], "tools[0].function.name"),
        (
            [{"type": "function", "function": {"name": "f", "parameters": 5}}],
            "tools[0].function.parameters",
        ),
        ([TOOL, {"type": "function", "function": {"name": "a b"}}], "tools[1].function.name"),
        ([{"type": "function", "function": {"name": "x" * 65}}], "tools[0].function.name"),
        ([{"type": "function", "function": {"name": "f\n"}}], "tools[0].function.name"),
        ([TOOL, TOOL], "tools[1].function.name"),
        ([TOOL] * 1025, "tools"),
        ("f", "tools"),
    ],
)
def test_wrong_tools_are_refused_by_their_place(tools: Any, param: str) -> None:
    assert refusal(tools=tools, tool_choice="none").param == param


def test_a_history_of_calls_is_in_the_shape_that_templates_expect() -> None:
    result = {"role": "tool", "content": "rain", "tool_call_id": "c1"}
    asked = read(USER, calling(call('{"city": "x", "n": 1}', index=0)), result)
    function = {"name": "f", "arguments": {"city": "x", "n": 1}}
    made = {"id": "c1", "type": "function", "function": function}
    assert asked.conversation == [
        USER,
        {"role": "assistant", "content": None, "tool_calls": [made]},
        result,
    ]


def test_what_clients_parsed_of_an_answer_may_be_sent_back() -> None:
    function = {"name": "f", "arguments": "{}", "parsed_arguments": {"x": None}}
    message = {**calling(call(function=function)), "parsed": {"x": 1}}
    assert read(message).conversation == read(calling(call())).conversation


def test_a_call_may_have_no_id_and_no_arguments_and_its_message_no_content() -> None:
    message = {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": ""}}]}
    (plain,) = read(message).conversation
    assert plain["content"] is None
    assert plain["tool_calls"] == [{"type": "function", "function": {"name": "f", "arguments": {}}}]


@pytest.mark.parametrize("name", ["reasoning_content", "reasoning"])
def test_reasoning_in_a_history_has_both_names(name: str) -> None:
    (plain,) = read({"role": "assistant", "content": "4", name: "2 + 2"}).conversation
    assert plain["reasoning_content"] == plain["reasoning"] == "2 + 2"


def test_calls_of_others_are_left_out() -> None:
    assert read({**USER, "tool_calls": [call()]}).conversation == [USER]


@pytest.mark.parametrize(
    ("message", "param"),
    [
        (calling(), "content"),
        (calling(5), "tool_calls[0]"),
        (calling({}), "tool_calls[0].function"),
        (calling(call(type="custom")), "tool_calls[0].type"),
        (calling(call(more=SECRET)), "tool_calls[0].more"),
        (calling(call(), call(index="1")), "tool_calls[1].index"),
        (calling({"function": {"name": "f"}}), "tool_calls[0].function.arguments"),
        (calling(call({"a": 1})), "tool_calls[0].function.arguments"),
        (calling(*[call()] * 1025), "tool_calls"),
    ],
)
def test_wrong_calls_are_refused_by_their_place(message: Any, param: str) -> None:
    assert refusal(USER, message).param == f"messages[1].{param}"


@pytest.mark.parametrize(
    "text", ['{"city": "Pa', "[1]", '{"a": 1, "a": 2}', '{"a":' * 40 + "1" + "}" * 40, " "]
)
def test_arguments_that_are_no_object_stay_a_text(text: str) -> None:
    (plain,) = read(calling(call(text))).conversation
    assert plain["tool_calls"][0]["function"]["arguments"] == text


def variables(read_by_template: set[str], **given: Any) -> Any:
    return rendering_of(read(chat_template_kwargs=given), frozenset(read_by_template)).variables


def test_variables_that_the_template_reads_are_passed_on() -> None:
    given = {"enable_thinking": False, "effort": "low", "budget": 512, "rate": 0.5}
    assert variables({*given, "other"}, **given) == given


@pytest.mark.parametrize(
    ("effort", "known", "passed"),
    [
        ("high", {"reasoning_effort"}, {"reasoning_effort": "high"}),
        ("none", {"enable_thinking"}, {"enable_thinking": False}),
        ("none", {"thinking"}, {"thinking": False}),
        ("low", {"enable_thinking"}, {}),
        ("none", {"other"}, {}),
        (None, {"reasoning_effort", "enable_thinking"}, {}),
    ],
)
def test_the_effort_reaches_the_variables_of_the_template(
    effort: str | None, known: set[str], passed: Any
) -> None:
    assert rendering_of(read(), frozenset(known), effort).variables == passed


def test_a_variable_that_is_said_goes_before_the_effort() -> None:
    asked = read(chat_template_kwargs={"enable_thinking": True})
    how = rendering_of(asked, frozenset({"enable_thinking"}), "none")
    assert how.variables == {"enable_thinking": True}


def test_switches_that_clients_send_to_any_model_have_no_effect_on_others() -> None:
    assert variables(set(), enable_thinking=True, thinking=False) == {}


def test_a_variable_that_is_null_is_unsaid() -> None:
    assert variables({"effort"}, effort=None) == {}


@pytest.mark.parametrize(
    "name", [*sorted(RESERVED_VARIABLES), "effort", "raise_exception", "x" * 200]
)
def test_other_variables_are_refused_with_the_reason(name: str) -> None:
    with pytest.raises(ApiError) as caught:
        variables({"messages", "tools", "enable_thinking"}, **{name: "x"})
    assert caught.value.param == "chat_template_kwargs"
    why = "not for clients to set" if name in RESERVED_VARIABLES else "reads no variable"
    assert why in caught.value.message


@pytest.mark.parametrize(
    "value", [[], {}, {"a": 1}, [SECRET], "x" * 513, 1 << 21, -(1 << 21), 1e30]
)
def test_a_variable_is_a_small_scalar(value: Any) -> None:
    assert refusal(chat_template_kwargs={"enable_thinking": value}).param == "chat_template_kwargs"


def test_the_number_of_variables_is_bounded() -> None:
    many = {f"v{number}": 1 for number in range(33)}
    assert refusal(chat_template_kwargs=many).param == "chat_template_kwargs"


@pytest.mark.parametrize(
    ("fields", "add", "go_on"),
    [
        ({}, True, False),
        ({"add_generation_prompt": False}, False, False),
        ({"continue_final_message": True}, False, True),
        ({"continue_final_message": True, "add_generation_prompt": False}, False, True),
    ],
)
def test_where_the_prompt_ends(fields: Any, add: bool, go_on: bool) -> None:
    how = rendering_of(read(**fields), frozenset())
    assert (how.add_generation_prompt, how.continue_final_message) == (add, go_on)


def test_a_prompt_ends_in_one_way() -> None:
    both = {"continue_final_message": True, "add_generation_prompt": True}
    assert refusal(**both).param == "add_generation_prompt"
    error = refusal(USER, calling(call()), continue_final_message=True)
    assert error.param == "continue_final_message"
