"""Fields that exist elsewhere but not here: refused by name, passed where they ask for nothing."""

import json
import re
import time
from typing import Any

import pytest

from sagellm.gateway.failure import ApiError
from sagellm.gateway.protocol.chat import ChatRequest, read_chat
from sagellm.gateway.protocol.completions import CompletionRequest, read_completion
from sagellm.gateway.protocol.unbuilt import MESSAGE, PART, REQUEST
from sagellm.gateway.settings import Limits

LIMITS = Limits()
CHAT = {"messages": [{"role": "user", "content": "hi"}]}

ASKED: dict[str, Any] = {
    "tools": [{"type": "function", "function": {"name": "f"}}],
    "tool_choice": "auto",
    "response_format": {"type": "json_object"},
    "chat_template": "{{ ''.__class__ }}",
    "chat_template_kwargs": {"tokenize": True},
    "trust_remote_code": True,
    "mm_processor_kwargs": {"code_revision": "x"},
    "prompt_embeds": "AAAA",
    "kv_transfer_params": {"do_remote_decode": True},
    "structured_outputs": {"regex": "(a+)+b"},
    "guided_json": {"$ref": "#"},
    "guided_regex": "a{1,1000}{1,1000}",
    "logits_processors": ["os.system"],
    "lora_request": {"lora_path": "/etc"},
    "use_beam_search": True,
    "allowed_token_ids": [],
    "bad_words": ["x"] * 129,
    "suffix": "",
    "modalities": ["text", "audio"],
    "metadata": {"a": "b"},
    "store": True,
    "service_tier": "flex",
    "length_penalty": 1.5,
    "add_generation_prompt": False,
    "continue_final_message": True,
    "return_tokens_as_token_ids": True,
    "vllm_xargs": {"a": 1},
}


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
    assert error.message == f"{name}: this server does not support it; leave it out"


@pytest.mark.parametrize("read", [chat, completion])
@pytest.mark.parametrize("name", REQUEST)
def test_an_unbuilt_field_may_ask_for_nothing(read: Any, name: str) -> None:
    for value in (None, *REQUEST[name]):
        read(**{name: value})
    with pytest.raises(ApiError, match=name):
        read(**{name: {"an": "object"}})


def test_null_and_one_are_not_false_and_true() -> None:
    for name, value in {"store": 0, "trust_remote_code": 0, "add_generation_prompt": 1}.items():
        with pytest.raises(ApiError):
            chat(**{name: value})


@pytest.mark.parametrize("name", MESSAGE)
def test_a_message_may_ask_for_nothing(name: str) -> None:
    message = {"role": "assistant", "content": "x"}
    for value in (None, *MESSAGE[name]):
        chat(messages=[{**message, name: value}])
    with pytest.raises(ApiError, match=re.escape(f"messages[0].{name}")):
        chat(messages=[{**message, name: {"an": "object"}}])


@pytest.mark.parametrize("name", PART)
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
    built = {*ChatRequest.__struct_fields__, *CompletionRequest.__struct_fields__}
    assert not built & set(REQUEST)
