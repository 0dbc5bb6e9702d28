"""Bodies of /v1/responses: what is read, what is dropped, and what is refused by its place."""

import json
from typing import Any, get_type_hints

import pytest
from hypothesis import given
from hypothesis import strategies as st
from openai.types.responses.response_create_params import ResponseCreateParamsBase

from sagellm.gateway.api_errors import ApiError
from sagellm.gateway.item_memory import ItemMemory, ReferencedItems
from sagellm.gateway.protocol.responses_body import ResponsesCall, read_responses
from sagellm.gateway.protocol.responses_chat import FindItem
from sagellm.gateway.protocol.responses_fields import (
    RENAMED,
    RESPONSES,
    SENT,
    SHARED,
    InputMessage,
    ResponsesRequest,
)
from sagellm.gateway.settings import RequestLimits

LIMITS = RequestLimits()
USER = {"role": "user", "content": "hi"}


CALL = {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"}
NOTHING_KEPT = ReferencedItems(ItemMemory(), "t", 0)


def read(find: FindItem = NOTHING_KEPT, **body: Any) -> ResponsesCall:
    return read_responses(json.dumps({"input": "hi", **body}).encode(), LIMITS, find)


def refused(**body: Any) -> ApiError:
    with pytest.raises(ApiError) as caught:
        read(**body)
    assert caught.value.status == 400
    return caught.value


def test_a_body_may_have_all_levels_though_a_chat_has_more() -> None:
    schema: dict[str, Any] = {}
    for _ in range(LIMITS.json_depth - 4):
        schema = {"not": schema}
    tool = {"type": "function", "name": "f", "parameters": schema}
    (read_tool,) = read(tools=[tool]).chat.tools
    assert read_tool.function.parameters == schema
    refused(tools=[{**tool, "parameters": {"not": {"not": schema}}}])


def item(**fields: Any) -> dict[str, Any]:
    return {"input": [fields]}


def test_no_field_of_the_api_is_unknown() -> None:
    known = {*ResponsesRequest.__struct_fields__, *RENAMED, *SHARED}
    known |= {*RESPONSES.unbuilt, *RESPONSES.taken}
    assert set(get_type_hints(ResponseCreateParamsBase)) - known == set()


def test_the_fields_of_a_chat_are_read_as_by_a_chat() -> None:
    call = read(
        model="m",
        max_output_tokens=7,
        temperature=0.5,
        top_k=3,
        seed=9,
        stop=["x"],
        priority=1,
        prompt_cache_key="k",
    )
    chat = call.chat
    assert (chat.model, chat.asked_tokens, chat.temperature, chat.top_k) == ("m", 7, 0.5, 3)
    assert (chat.seed, chat.stops, chat.priority, chat.n) == (9, ("x",), 1, 1)


def test_what_an_answer_had_may_be_sent_back_as_it_was() -> None:
    part = {"type": "output_text", "text": "so", "annotations": [], "logprobs": [], "parsed": {}}
    call = read(
        input=[
            {**USER, "type": "message", "status": "completed"},
            {"type": "reasoning", "id": "rs", "summary": [], "encrypted_content": None},
            {"id": "m", "type": "message", "role": "assistant", "status": "x", "content": [part]},
            {
                "type": "function_call",
                "id": "fc",
                "call_id": "c",
                "name": "f",
                "arguments": "",
                "parsed_arguments": {},
                "status": "completed",
            },
            {"type": "function_call_output", "call_id": "c", "output": "5", "id": None},
        ]
    )
    assert [message.role for message in call.chat.messages] == ["user", "assistant", "tool"]
    assert call.chat.messages[1].content == "so"


@pytest.mark.parametrize("reference", [{"type": "item_reference", "id": "m1"}, {"id": "m1"}])
def test_a_referenced_item_stands_in_its_place(reference: Any) -> None:
    asked = []

    def find(item_id: str, place: str) -> InputMessage:
        asked.append((item_id, place))
        return InputMessage(role="assistant", content="so")

    messages = read(find, input=[USER, reference, USER]).chat.messages
    assert [message.content for message in messages] == ["hi", "so", "hi"]
    assert asked == [("m1", "input[1]")]


@pytest.mark.parametrize(
    "harmless",
    [
        {"store": True},
        {"background": False},
        {"service_tier": "auto", "max_tool_calls": 3, "prompt_cache_retention": "24h"},
        {"stream_options": {"include_obfuscation": False}},
        {"previous_response_id": None, "conversation": None},
        {"include": ["reasoning.encrypted_content", "code_interpreter_call.outputs"]},
        {"text": {"verbosity": "low"}},
        {"reasoning": {"summary": "auto", "effort": None}},
        {"metadata": {"a": "b"}},
    ],
)
def test_what_asks_for_nothing_is_taken(harmless: Any) -> None:
    assert read(**harmless).chat == read().chat


@pytest.mark.parametrize(
    ("body", "param", "told"),
    [
        ({"previous_response_id": "resp_1"}, "previous_response_id", "are not stored"),
        ({"conversation": {"id": "c"}}, "conversation", "are not stored"),
        ({"background": True}, "background", "use `stream`"),
        ({"prompt": {"id": "p"}}, "prompt", "no stored prompts"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type", "`web_search` is not built"),
        ({"tools": [{"type": "mcp"}]}, "tools[0].type", "`mcp` is not built"),
        ({"tools": [{"type": "custom", "name": "f"}]}, "tools[0].type", "`custom` is not built"),
        ({"tool_choice": {"type": "file_search"}}, "tool_choice.type", "`file_search` is not"),
        (item(type="web_search_call", id="x"), "input[0].type", "only `message`"),
        (
            item(role="user", content=[{"type": "input_image", "image_url": "http://x"}]),
            "input[0].content[0].type",
            "`input_image` is not built",
        ),
        (
            item(type="function_call_output", call_id="c", output=[{"type": "input_file"}]),
            "input[0].output[0].type",
            "`input_file` is not built",
        ),
        ({"stream_options": {"include_obfuscation": True}}, "stream_options", "not support"),
        ({"text": {"format": {"type": "grammar"}}}, "text.format.type", "only `text`"),
        ({"reasoning": {"mode": "pro"}}, "reasoning.mode", "not support"),
    ],
)
def test_what_is_not_built_is_refused_with_a_reason(body: Any, param: str, told: str) -> None:
    error = refused(**body)
    assert (error.param, error.code) == (param, "unsupported_parameter")
    assert told in error.message


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"input": []}, "input"),
        ({"input": ""}, "input"),
        ({"input": None}, "input"),
        ({"input": 5}, "input"),
        ({"input": ["hi"]}, "input[0]"),
        ({"input": [USER] * (LIMITS.num_messages + 1)}, "input"),
        (item(role="tool", content="x"), "input[0].role"),
        (item(role="user"), "input[0].content"),
        (item(role="user", content=[{"text": "x"}]), "input[0].content[0].type"),
        (
            item(role="user", content=[{"type": "input_text", "text": 5}]),
            "input[0].content[0].text",
        ),
        (item(type="function_call", call_id="c", name="f", arguments=5), "input[0].arguments"),
        (item(type="function_call", name="f", arguments=""), "input[0].call_id"),
        (item(type="function_call_output", call_id="c"), "input[0].output"),
        (item(type="reasoning", summary="x"), "input[0].summary"),
        ({"input": [CALL] * 1025}, "input[1024]"),
        (item(type="item_reference"), "input[0].id"),
        (item(type="item_reference", id=5), "input[0].id"),
        (item(type="item_reference", id="m", role="user"), "input[0].role"),
        ({"store": "no"}, "store"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"temperature": -1}, "temperature"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"top_logprobs": 99, "include": ["message.output_text.logprobs"]}, "top_logprobs"),
        ({"include": ["everything"]}, "include[0]"),
        ({"truncation": "some"}, "truncation"),
        ({"text": {"verbosity": "loud"}}, "text.verbosity"),
        ({"text": {"format": {"type": "json_schema", "name": "n"}}}, "text.format.schema"),
        ({"reasoning": {"effort": "huge"}}, "reasoning.effort"),
        ({"metadata": {"a": 5}}, "metadata"),
        ({"tools": [{"type": "function"}]}, "tools[0].name"),
        ({"tool_choice": "any"}, "tool_choice"),
        ({"tool_choice": {"type": "function"}}, "tool_choice.name"),
    ],
)
def test_a_wrong_field_is_named(body: Any, param: str) -> None:
    assert refused(**body).param == param


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("max_tokens", "max_output_tokens"),
        ("messages", "input"),
        ("functions", "tools"),
        ("function_call", "tool_choice"),
        ("system", "instructions"),
        ("response_format", "text.format"),
        ("instruction", "instructions"),
    ],
)
def test_an_unknown_field_is_refused_with_the_one_that_was_meant(name: str, meant: str) -> None:
    error = refused(**{name: {}})
    assert (error.param, error.code) == (name, "unknown_parameter")
    assert f"did you mean `{meant}`?" in error.message


FUNCTION = {"name": "f", "parameters": {}}


@pytest.mark.parametrize(
    ("body", "param", "told"),
    [
        (
            {"tools": [{"type": "function", "function": FUNCTION}]},
            "tools[0].function",
            "beside `type`",
        ),
        (
            {"tool_choice": {"type": "function", "function": {"name": "f"}}},
            "tool_choice.function",
            "beside `type`",
        ),
        (
            {"text": {"format": {"type": "json_schema", "json_schema": {"name": "n"}}}},
            "text.format.json_schema",
            "beside `type`",
        ),
        (
            {"tools": [{"type": "function", "name": "f", "input_schema": {}}]},
            "tools[0].input_schema",
            "`parameters`",
        ),
        (
            item(role="assistant", content="", tool_calls=[{"id": "c"}]),
            "input[0].tool_calls",
            "`function_call`",
        ),
        (
            item(role="tool", content="5", tool_call_id="c"),
            "input[0].tool_call_id",
            "`function_call_output`",
        ),
    ],
)
def test_an_object_of_a_chat_is_refused_with_the_form_of_this_api(
    body: Any, param: str, told: str
) -> None:
    error = refused(**body)
    assert (error.param, error.code) == (param, "unknown_parameter")
    assert told in error.message


def test_integers_beyond_64_bits_come_through() -> None:
    schema = {"const": -9_999_999_999_999_999_999}
    tool = {"type": "function", "name": "f", "parameters": schema}
    assert read(tools=[tool], tool_choice="none").asked.tools[0].parameters == schema


MARK = "no-one-reads-this"
NAMES = [
    *{name for struct in SENT for name in struct.__struct_fields__},
    *{name for tables in SENT.values() for table in tables for name in table},
    "type",
    MARK + "!",
]
WORDS = [
    "",
    MARK,
    *(
        "message",
        "item_reference",
        "function_call",
        "function_call_output",
        "reasoning",
        "function",
        "allowed_tools",
    ),
    *("input_text", "output_text", "refusal", "summary_text", "reasoning_text", "text"),
    *("json_object", "json_schema", "user", "assistant", "system", "auto", "required", "low"),
]
SCALARS = st.none() | st.booleans() | st.integers(-3, 9) | st.floats(-2, 2) | st.sampled_from(WORDS)
VALUES = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(NAMES), inner, max_size=4)
    ),
    max_leaves=10,
)
TYPED = st.builds(
    lambda kind, fields: {**fields, "type": kind},
    st.sampled_from(WORDS),
    st.dictionaries(st.sampled_from(NAMES), VALUES, max_size=5),
)
BODIES = st.fixed_dictionaries(
    {"input": st.lists(TYPED | VALUES, max_size=3) | VALUES},
    optional={
        **dict.fromkeys((*SHARED, *RENAMED, *RESPONSES.unbuilt, *RESPONSES.taken), VALUES),
        **dict.fromkeys(("text", "reasoning", "tool_choice", "include"), VALUES | TYPED),
        "tools": st.lists(TYPED, max_size=2) | VALUES,
        MARK + "!": VALUES,
    },
)


@given(body=BODIES)
def test_any_object_is_a_request_or_refused(body: Any) -> None:
    try:
        read_responses(json.dumps(body).encode(), LIMITS, NOTHING_KEPT)
    except ApiError as error:
        if error.status not in (400, 404) or MARK in f"{error.message} {error.param}":
            raise
