"""Fields that exist elsewhere but not here: refused by name, passed where they ask for nothing."""

import json
import re
import time
from typing import Any

import pytest

from sagellm.gateway.api_errors import ApiError
from sagellm.gateway.protocol.bodies import (
    ChatRequest,
    CompletionRequest,
    read_chat,
    read_completion,
)
from sagellm.gateway.protocol.chat_messages import ConversationMessage, TextPart
from sagellm.gateway.protocol.other_apis import MESSAGE, PART, REQUEST
from sagellm.gateway.settings import RequestLimits

LIMITS = RequestLimits()
CHAT = {"messages": [{"role": "user", "content": "hi"}]}

ASKED: dict[str, Any] = {
    "chat_template": "{{ ''.__class__ }}",
    "trust_remote_code": True,
    "mm_processor_kwargs": {"code_revision": "x"},
    "prompt_embeds": "AAAA",
    "kv_transfer_params": {"do_remote_decode": True},
    "guided_whitespace_pattern": " *",
    "functions": [{"name": "f"}],
    "function_call": "auto",
    "logits_processors": ["os.system"],
    "lora_request": {"lora_path": "/etc"},
    "use_beam_search": True,
    "suffix": "",
    "modalities": ["text", "audio"],
    "length_penalty": 1.5,
    "vllm_xargs": {"a": 1},
}

CURES = {"functions": "send `tools`", "function_call": "send `tool_choice`"}


def chat(**fields: Any) -> ChatRequest:
    return read_chat(json.dumps({**CHAT, **fields}).encode(), LIMITS)


def completion(**fields: Any) -> CompletionRequest:
    return read_completion(json.dumps({"prompt": "hi", **fields}).encode(), LIMITS)


@pytest.mark.parametrize("read", [chat, completion])
@pytest.mark.parametrize("name", ASKED)
def test_an_unbuilt_field_is_refused_by_name(read: Any, name: str) -> None:
    with pytest.raises(ApiError) as caught:
        read(**{name: ASKED[name]})
    error = caught.value
    assert (error.status, error.param, error.code) == (400, name, "unsupported_parameter")
    cure = CURES.get(name, "leave it out") if read is chat else "leave it out"
    assert error.message == f"{name}: this server does not support it; {cure}"


FLAT = {"type": "function", "name": "f", "parameters": {}}


@pytest.mark.parametrize(
    ("fields", "cure"),
    [
        ({"input": "hi"}, "unknown field `input`; send `messages`"),
        ({"text": {}}, "send `response_format`"),
        ({"max_output_tokens": 5}, "send `max_completion_tokens`"),
        ({"system": "a"}, "send it as a message of the role `system`"),
        ({"tools": [FLAT]}, "unknown field `name` in tools[0]; send it in `function`"),
        ({"tools": [{"input_schema": {}}]}, "send it as `parameters` in `function`"),
        ({"tools": [{"type": "function", "function": {"input_schema": {}}}]}, "send `parameters`"),
        ({"tool_choice": {"type": "function", "name": "f"}}, "send it in `function`"),
        ({"tool_choice": {"type": "allowed_tools", "mode": "auto"}}, "send it in `allowed_tools`"),
        ({"tool_choice": {"type": "function", "function": {"named": "f"}}}, "unknown field"),
        ({"response_format": {"type": "json_schema", "schema": {}}}, "send it in `json_schema`"),
        ({"response_format": {"json_schema": {"type": "object"}}}, "send it in `schema`"),
        ({"messages": [{"role": "assistant", "function_call": {}}]}, "send `tool_calls`"),
    ],
)
def test_a_field_of_another_api_is_refused_with_the_name_here(fields: Any, cure: str) -> None:
    with pytest.raises(ApiError, match=re.escape(cure)):
        chat(**fields)


def test_messages_are_for_chats() -> None:
    with pytest.raises(ApiError, match="send chats to /v1/chat/completions"):
        completion(messages=[])


# What chats have built is unbuilt for completions.
OF_CHATS = {
    "add_generation_prompt": False,
    "chat_template_kwargs": {"thinking": True},
    "continue_final_message": True,
    "include_reasoning": False,
    "tool_choice": "auto",
    "tools": [{"type": "function", "function": {"name": "f"}}],
}


@pytest.mark.parametrize("name", OF_CHATS)
def test_a_field_of_chats_is_refused_in_a_completion(name: str) -> None:
    with pytest.raises(ApiError, match=f"{name}: this server does not support it"):
        completion(**{name: OF_CHATS[name]})


@pytest.mark.parametrize("read", [chat, completion])
@pytest.mark.parametrize("name", REQUEST.unbuilt)
def test_an_unbuilt_field_may_ask_for_nothing(read: Any, name: str) -> None:
    for value in (None, *REQUEST.unbuilt[name]):
        read(**{name: value})
    if name == "chat_template_kwargs" and read is chat:
        return  # whether a template reads it, the endpoint asks the model
    with pytest.raises(ApiError, match=name):
        read(**{name: {"an": "object"}})


def test_null_and_one_are_not_false_and_true() -> None:
    for name, value in {"watermarking": 0, "trust_remote_code": 0, "include_reasoning": 1}.items():
        with pytest.raises(ApiError):
            chat(**{name: value})


@pytest.mark.parametrize("name", MESSAGE.unbuilt)
def test_a_message_may_ask_for_nothing(name: str) -> None:
    message = {"role": "assistant", "content": "x"}
    for value in (None, *MESSAGE.unbuilt[name]):
        chat(messages=[{**message, name: value}])
    with pytest.raises(ApiError, match=re.escape(f"messages[0].{name}")):
        chat(messages=[{**message, name: {"an": "object"}}])


@pytest.mark.parametrize("name", PART.unbuilt)
def test_a_part_may_ask_for_nothing(name: str) -> None:
    part = {"type": "text", "text": "x"}
    chat(messages=[{"role": "user", "content": [{**part, name: None}]}])
    with pytest.raises(ApiError, match=re.escape(f"messages[0].content[0].{name}")):
        chat(messages=[{"role": "user", "content": [{**part, name: {"an": "object"}}]}])


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("max_token", "max_tokens"),
        ("temprature", "temperature"),
        ("topp", "top_p"),
        ("Stream", "stream"),
        ("stop_tokens_ids", "stop_token_ids"),
    ],
)
def test_an_unknown_field_gets_the_nearest_name(name: str, near: str) -> None:
    with pytest.raises(ApiError) as caught:
        completion(**{name: 1})
    error = caught.value
    assert (error.status, error.param, error.code) == (400, name, "unknown_parameter")
    assert error.message == f"unknown field `{name}`; did you mean `{near}`?"


@pytest.mark.parametrize("name", ["zzzzzzzz", "__class__", "x" * 64])
def test_a_field_like_none_is_only_named(name: str) -> None:
    with pytest.raises(ApiError, match=f"unknown field `{name}`"):
        completion(**{name: 1})


@pytest.mark.parametrize(
    "name", ["", "a b", "\x1b[31m", "</script>", "é", "max_tokens\n", "x" * 10**6]
)
def test_a_name_that_is_none_is_not_shown(name: str) -> None:
    with pytest.raises(ApiError) as caught:
        completion(**{name: 1})
    assert caught.value.message == f"unknown field of {len(name)} characters" + (
        "; did you mean `max_tokens`?" if name == "max_tokens\n" else ""
    )
    assert caught.value.param is None


def test_a_long_name_is_compared_to_none() -> None:
    """Looking for its neighbours would take seconds."""
    started = time.process_time()
    with pytest.raises(ApiError):
        completion(**{"ab" * (2 << 20): 1})
    assert time.process_time() - started < 0.5


def test_no_field_is_both_built_and_unbuilt() -> None:
    """But for what the other endpoint has built."""
    chat_fields, completion_fields = (
        {*one.__struct_fields__} for one in (ChatRequest, CompletionRequest)
    )
    assert not chat_fields & completion_fields & set(REQUEST.unbuilt)
    assert not (chat_fields | completion_fields | set(REQUEST.unbuilt)) & set(REQUEST.taken)
    assert not set(MESSAGE.unbuilt) & {*ConversationMessage.__struct_fields__, *MESSAGE.taken}
    assert not set(PART.unbuilt) & {*TextPart.__struct_fields__, *PART.taken}


# What one API or another adds to an answer, which clients send back.
ECHOED: dict[str, Any] = {
    "openai-python": {
        "refusal": None,
        "annotations": [],
        "audio": None,
        "function_call": None,
        "tool_calls": None,
    },
    "LiteLLM": {
        "function_call": None,
        "provider_specific_fields": {"refusal": None},
        "thinking_blocks": [{"type": "thinking", "thinking": "x", "signature": ""}],
        "images": [],
        "annotations": [],
    },
    "OpenRouter": {"reasoning": "so", "reasoning_details": [{"type": "reasoning.text"}]},
    "vLLM": {"reasoning": None, "reasoning_content": None, "tool_calls": []},
}


@pytest.mark.parametrize("api", ECHOED)
def test_an_answer_of_another_api_may_be_sent_back(api: str) -> None:
    asked = chat(messages=[{"role": "assistant", "content": "hi", **ECHOED[api]}])
    assert asked.messages[0].content == "hi"


VALUES: dict[str, Any] = {"object": {"a": "b"}, "string": "x", "boolean": True, "number": 2.5}


@pytest.mark.parametrize("read", [chat, completion])
@pytest.mark.parametrize("name", REQUEST.taken)
def test_a_taken_field_is_checked_by_type_and_dropped(read: Any, name: str) -> None:
    kind = REQUEST.taken[name].type
    assert read(**{name: VALUES[kind]}) == read(**{name: None}) == read()
    for value in ([], *(value for other, value in VALUES.items() if other != kind)):
        with pytest.raises(ApiError, match=rf"{name}: must be an? {kind}"):
            read(**{name: value})


def test_taken_fields_of_messages_parts_and_calls() -> None:
    mark = {"type": "ephemeral"}
    part = {"type": "text", "text": "hi", "cache_control": mark, "prompt_cache_breakpoint": {}}
    message = {"role": "user", "content": [part], "id": "msg_1", "cache_control": mark}
    assert chat(messages=[message]).conversation == CHAT["messages"]
    with pytest.raises(ApiError, match=re.escape("messages[0].id: must be a string")):
        chat(messages=[{**message, "id": 5}])
    with pytest.raises(ApiError, match=re.escape("messages[0].content[0].cache_control: must be")):
        chat(messages=[{**message, "content": [{**part, "cache_control": True}]}])


@pytest.mark.parametrize("read", [chat, completion])
def test_what_nobody_knows_may_be_null(read: Any) -> None:
    assert read(nobody_knows_it=None, **{"a b": None}) == read()
    chat(messages=[{**CHAT["messages"][0], "nor_this": None}])


@pytest.mark.parametrize("fields", [{"best_of": 1}, {"echo": False}, {"stream_options": {}}])
@pytest.mark.parametrize("read", [chat, completion])
def test_what_changes_nothing_is_read(read: Any, fields: dict[str, Any]) -> None:
    read(**fields)
    read(**fields, n=3)
