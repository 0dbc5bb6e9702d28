"""/tokenize in both forms, and /detokenize."""

import json
from typing import Any

import pytest

from sagellm.gateway.api_errors import ApiError
from sagellm.gateway.protocol.bodies import (
    DetokenizeRequest,
    TokenizeChat,
    TokenizePrompt,
    read_detokenize,
    read_tokenize,
)
from sagellm.gateway.settings import RequestLimits

LIMITS = RequestLimits()
USER = {"role": "user", "content": "hi"}


def tokenize(**fields: Any) -> TokenizePrompt | TokenizeChat:
    return read_tokenize(json.dumps(fields).encode(), LIMITS)


def detokenize(**fields: Any) -> DetokenizeRequest:
    return read_detokenize(json.dumps(fields).encode(), LIMITS)


def test_a_text_is_read() -> None:
    assert tokenize(prompt="hi") == TokenizePrompt(prompt="hi")
    assert tokenize(prompt="", messages=None) == TokenizePrompt(prompt="")
    said = {"model": "m", "prompt": "hi", "add_special_tokens": False, "return_token_strs": True}
    assert tokenize(**said) == TokenizePrompt(**said)


def test_a_conversation_is_read() -> None:
    request = tokenize(messages=[USER], add_generation_prompt=True)
    assert isinstance(request, TokenizeChat)
    assert request.conversation == [USER]
    assert not request.add_special_tokens


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({}, "prompt"),
        ({"prompt": None}, "prompt"),
        ({"prompt": ["a"]}, "prompt"),
        ({"prompt": 5}, "prompt"),
        ({"prompt": "a", "messages": [USER]}, "prompt"),
        ({"messages": None}, "prompt"),
        ({"messages": []}, "messages"),
        ({"messages": "a"}, "messages"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": [USER], "chat_template": "x"}, "chat_template"),
        ({"messages": [USER], "add_generation_prompt": 0}, "add_generation_prompt"),
        (
            {"messages": [USER], "continue_final_message": True, "add_generation_prompt": True},
            "add_generation_prompt",
        ),
        ({"messages": [USER], "tools": [{}]}, "tools[0].type"),
        ({"prompt": "a", "max_tokens": 5}, "max_tokens"),
        ({"prompt": "a", "return_token_strs": 1}, "return_token_strs"),
    ],
)
def test_a_wrong_request_is_refused_by_name(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(ApiError) as caught:
        tokenize(**fields)
    assert (caught.value.status, caught.value.param) == (400, param)


def test_ids_are_read() -> None:
    assert detokenize(tokens=[0, 5], model="m") == DetokenizeRequest(tokens=[0, 5], model="m")
    assert detokenize(tokens=[]).tokens == []


@pytest.mark.parametrize("tokens", [None, "a", [-1], [1 << 31], [2**63], [1.5], [True], [[1]], 5])
def test_what_is_no_list_of_ids_is_refused(tokens: Any) -> None:
    with pytest.raises(ApiError) as caught:
        detokenize(tokens=tokens)
    assert caught.value.status == 400
    assert str(caught.value.param).startswith("tokens")


@pytest.mark.parametrize(
    "read", [lambda **f: tokenize(prompt="", **f), lambda **f: detokenize(tokens=[], **f)]
)
def test_the_name_of_no_model_is_not_found(read: Any) -> None:
    with pytest.raises(ApiError) as caught:
        read(model="x" * 257)
    assert (caught.value.status, caught.value.code) == (404, "model_not_found")
