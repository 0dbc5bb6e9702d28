"""Bodies of /v1/messages: what is read, and which field an error names."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sagellm.gateway.api_errors import ApiError
from sagellm.gateway.protocol.anthropic_body import read_count_body, read_messages_body
from sagellm.gateway.protocol.anthropic_chat import chat_of
from sagellm.gateway.protocol.anthropic_fields import SENT_OBJECTS, MessagesRequest
from sagellm.gateway.settings import RequestLimits

MARK = "no-one-reads-this"
USER = {"role": "user", "content": "hi"}
TOOL = {"name": "f", "input_schema": {"type": "object"}}
CALL = {"type": "tool_use", "id": "toolu_1", "name": "f", "input": {"x": 1}}
RESULT = {"type": "tool_result", "tool_use_id": "toolu_1", "content": "2"}
SCHEMA = {"type": "json_schema", "schema": {"type": "object"}}


def body_of(*messages: Any, **fields: Any) -> bytes:
    return json.dumps({"max_tokens": 5, "messages": messages or [USER], **fields}).encode()


def read(*messages: Any, **fields: Any) -> MessagesRequest:
    return read_messages_body(body_of(*messages, **fields), RequestLimits())


def refusal(*messages: Any, **fields: Any) -> ApiError:
    with pytest.raises(ApiError) as caught:
        read(*messages, **fields)
    assert caught.value.status == 400
    assert MARK not in f"{caught.value.message} {caught.value.param}"
    return caught.value


def of(role: str, *blocks: Any) -> dict[str, Any]:
    return {"role": role, "content": list(blocks)}


def test_a_plain_body_has_the_defaults_of_the_api() -> None:
    asked = read()
    assert (asked.max_tokens, asked.temperature, asked.stream) == (5, 1.0, False)
    assert asked.messages[0].content == "hi"


@pytest.mark.parametrize(
    "fields",
    [
        {"model": None, "system": None, "tools": None, "thinking": None, "metadata": None},
        {"system": [{"type": "text", "text": "a", "cache_control": {"type": "ephemeral"}}]},
        {"tools": [{**TOOL, "type": "custom", "cache_control": {"type": "ephemeral"}}]},
        {"tools": [{**TOOL, "type": None, "strict": True, "eager_input_streaming": False}]},
        {"tools": [{**TOOL, "allowed_callers": ["direct"], "defer_loading": False}]},
        {"tools": [TOOL], "tool_choice": {"type": "tool", "name": "f"}},
        {"thinking": {"type": "adaptive", "display": "omitted"}},
        {"thinking": {"type": "enabled", "budget_tokens": 1024}},
        {"container": None, "mcp_servers": [], "speed": "standard", "service_tier": "auto"},
        {"context_management": {"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]}},
        {"cache_control": {"type": "ephemeral"}, "metadata": {"user_id": "u"}},
        {"output_config": {"effort": "xhigh", "format": SCHEMA}},
        {"output_format": SCHEMA},
        {"nobody_knows_it": None},
    ],
)
def test_fields_that_ask_for_nothing_more_are_taken(fields: dict[str, Any]) -> None:
    assert read(**fields).max_tokens == 5


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"max_tokens": None}, "max_tokens"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"messages": []}, "messages"),
        ({"temperature": -1}, "temperature"),
        ({"top_k": -1}, "top_k"),
        ({"stop_sequences": ["a", ""]}, "stop_sequences[1]"),
        ({"system": 5}, "system"),
        ({"system": [{"type": "image"}]}, "system[0].type"),
        ({"system": [{"type": "text"}]}, "system[0].text"),
        ({"metadata": {"user": MARK}}, "metadata.user"),
        ({"metadata": {"user_id": MARK * 99}}, "metadata.user_id"),
        ({"container": MARK}, "container"),
        ({"mcp_servers": [{}]}, "mcp_servers"),
        ({"context_management": {"edits": [{"type": MARK}]}}, "context_management"),
        ({"speed": "fast"}, "speed"),
        ({"thread": {"type": "create"}}, "thread"),
        ({"service_tier": 1}, "service_tier"),
        ({"stop": ["a"]}, "stop"),
        ({"tools": [{}]}, "tools[0].name"),
        ({"tools": [TOOL, 5]}, "tools[1]"),
        ({"tools": [{**TOOL, "input_schema": []}]}, "tools[0].input_schema"),
        ({"tools": [{"type": "web_search_20250305", "name": "f"}]}, "tools[0].type"),
        ({"tools": [{**TOOL, "defer_loading": True}]}, "tools[0].defer_loading"),
        ({"tools": [TOOL], "tool_choice": {"type": MARK}}, "tool_choice.type"),
        ({"tools": [TOOL], "tool_choice": "auto"}, "tool_choice"),
        ({"tools": [TOOL], "tool_choice": {"type": "tool"}}, "tool_choice.name"),
        ({"tools": [TOOL], "tool_choice": {"type": "any", "name": "f"}}, "tool_choice.name"),
        ({"tool_choice": {"type": "any"}}, "tool_choice"),
        ({"thinking": {"type": "enabled"}}, "thinking.budget_tokens"),
        ({"thinking": {"type": "enabled", "budget_tokens": 0}}, "thinking.budget_tokens"),
        ({"thinking": {"type": [MARK]}}, "thinking.type"),
        ({"thinking": {"type": "adaptive", "display": MARK}}, "thinking.display"),
        ({"output_config": {"effort": MARK}}, "output_config.effort"),
        ({"output_config": {"format": {"type": MARK}}}, "output_config.format.type"),
        ({"output_config": {"format": {}}}, "output_config.format.type"),
        ({"output_format": {"type": "json_schema"}}, "output_format.schema"),
        ({"output_format": SCHEMA, "output_config": {"format": SCHEMA}}, "output_format"),
    ],
)
def test_an_error_names_the_field(fields: dict[str, Any], param: str) -> None:
    assert refusal(**fields).param == param


OPENAI_TOOL = {"type": "function", "function": {"name": "f", "parameters": {}}}


@pytest.mark.parametrize(
    ("fields", "cure"),
    [
        ({"response_format": {"type": "json_object"}}, "send `output_config.format`"),
        ({"max_completion_tokens": 5}, "send `max_tokens`"),
        ({"stop": "a"}, "send `stop_sequences`"),
        ({"reasoning_effort": "low"}, "send `output_config.effort`"),
        ({"stream_options": {}}, "every stream has the usage"),
        ({"tools": [OPENAI_TOOL]}, "its parameters as `input_schema`"),
        ({"tools": [{"function": {}}]}, "its parameters as `input_schema`"),
        ({"tools": [{"name": "f", "parameters": {}}]}, "send `input_schema`"),
        ({"tools": [TOOL] * 1025}, "has 1025 tools; the limit is 1024"),
        ({"tools": [TOOL], "tool_choice": "required"}, '{"type": "auto"}'),
        ({"tools": [TOOL], "tool_choice": {"type": "function", "function": {}}}, "its `name`"),
        ({"tool_choice": {"type": "any"}}, "has the type `any`, but there are no `tools`"),
        ({"messages": [{"role": "tool", "content": "a"}]}, "send a `tool_result` block"),
        ({"messages": [{"role": "developer", "content": "a"}]}, "send the role `system`"),
        ({"messages": [{"role": "assistant", "tool_calls": [{}]}]}, "send `tool_use` blocks"),
    ],
)
def test_a_field_of_another_api_is_refused_with_the_name_here(fields: Any, cure: str) -> None:
    assert cure in refusal(**fields).message


CITED = {"type": "text", "text": ""}
IMAGE = {"type": "image", "source": {"type": "url", "url": "http://169.254.169.254/" + MARK}}


@pytest.mark.parametrize(
    ("message", "param"),
    [
        (5, "messages[0]"),
        ({"content": "a"}, "messages[0].role"),
        ({"role": MARK, "content": "a"}, "messages[0].role"),
        ({"role": "user"}, "messages[0].content"),
        ({"role": "user", "content": None}, "messages[0].content"),
        ({"role": "user", "content": 5}, "messages[0].content"),
        ({**USER, "name": MARK}, "messages[0].name"),
        (of("user", 5), "messages[0].content[0]"),
        (of("user", {"text": MARK}), "messages[0].content[0].type"),
        (of("user", {"type": MARK}), "messages[0].content[0].type"),
        (of("user", {"type": "text", "text": 5}), "messages[0].content[0].text"),
        (of("user", {**CITED, "citations": [1]}), "messages[0].content[0].citations"),
        (of("user", IMAGE), "messages[0].content[0].type"),
        (of("user", {"type": "document"}), "messages[0].content[0].type"),
        (of("user", CALL), "messages[0].content[0].type"),
        (of("system", RESULT), "messages[0].content[0].type"),
        (of("assistant", RESULT), "messages[0].content[0].type"),
        (of("assistant", {**CALL, "input": "{}"}), "messages[0].content[0].input"),
        (of("assistant", {**CALL, "id": None}), "messages[0].content[0].id"),
        (of("user", {**RESULT, "is_error": 1}), "messages[0].content[0].is_error"),
        (of("user", {**RESULT, "content": [IMAGE]}), "messages[0].content[0].content[0].type"),
        (of("assistant", {"type": "text", "text": "a"}, CALL), "messages[0].content[1]"),
        (of("user", *[{"type": "text", "text": ""}] * 1025), "messages[0].content"),
    ],
)  # fmt: skip
def test_an_error_names_the_place_in_a_message(message: Any, param: str) -> None:
    assert refusal(message).param == param


def test_messages_are_bounded() -> None:
    limits = RequestLimits(num_messages=2)
    read_messages_body(body_of(USER, USER), limits)
    with pytest.raises(ApiError, match="has 3 messages; the limit is 2"):
        read_messages_body(body_of(USER, USER, USER), limits)


def test_a_count_takes_what_changes_the_prompt() -> None:
    said = {"messages": [USER], "system": "s", "tools": [TOOL], "thinking": {"type": "disabled"}}
    assert read_count_body(json.dumps(said).encode(), RequestLimits()).system == "s"
    with pytest.raises(ApiError, match="unknown field `max_tokens`"):
        read_count_body(json.dumps({**said, "max_tokens": 5}).encode(), RequestLimits())


TEXT = st.sampled_from(["", MARK, "user", "assistant", "text", "tool_use", "enabled", "any", "f"])
NAMES = st.sampled_from(
    [
        *(name for struct in SENT_OBJECTS for name in struct.__struct_fields__),
        *(name for foreign in SENT_OBJECTS.values() for table in foreign[:2] for name in table),
        *("type", "role", MARK + "!"),
    ]
)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 40) | st.just(2**63) | st.floats(-3, 3) | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=3),
    max_leaves=8,
)
OBJECTS = [
    *({"type": "text", "text": "a"}, CALL, RESULT, IMAGE, TOOL, SCHEMA, {"type": "any"}),
    *({"type": "thinking", "thinking": "t"}, {"type": "redacted_thinking", "data": "d"}),
]
CHANGED = st.builds(
    lambda one, name, value: {**one, name: value}, st.sampled_from(OBJECTS), NAMES, VALUES
)
BLOCKS = st.lists(st.sampled_from(OBJECTS) | CHANGED | VALUES, max_size=3)
TURNS = st.fixed_dictionaries(
    {"role": st.sampled_from(["user", "assistant", "system"]), "content": TEXT | BLOCKS}
)
BODIES = st.builds(
    lambda turns, more: {"max_tokens": 5, "messages": turns, **more},
    st.lists(TURNS | VALUES, max_size=3),
    st.dictionaries(NAMES, VALUES | BLOCKS, max_size=2),
)


@given(said=BODIES)
def test_any_body_is_a_chat_or_refused(said: dict[str, Any]) -> None:
    limits = RequestLimits()
    try:
        chat = chat_of(read_messages_body(json.dumps(said).encode(), limits))
        with chat.naming():
            chat.read(limits)
    except ApiError as error:
        shown = f"{error.message} {error.param} {error.code}"
        # `function` is a name of the chat, and of no field here.
        if error.status not in (400, 404) or MARK in shown or "function" in str(error.param):
            raise
