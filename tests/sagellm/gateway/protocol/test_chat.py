"""A chat's body: messages by role and part, log probabilities, and places that are named."""

import json
from typing import Any

import pytest

from sagellm.gateway.api_errors import ApiError
from sagellm.gateway.protocol.bodies import ChatRequest, read_chat
from sagellm.gateway.settings import RequestLimits

LIMITS = RequestLimits()
USER = {"role": "user", "content": "hi"}
SECRET = "the-prompt-nobody-may-see"


def read(*messages: Any, limits: RequestLimits = LIMITS, **fields: Any) -> ChatRequest:
    return read_chat(json.dumps({"messages": messages or [USER], **fields}).encode(), limits)


def refusal(*messages: Any, **fields: Any) -> ApiError:
    with pytest.raises(ApiError) as caught:
        read(*messages, **fields)
    assert caught.value.status == 400
    return caught.value


@pytest.mark.parametrize(
    ("message", "plain"),
    [
        (USER, USER),
        ({"role": "system", "content": "be brief"}, {"role": "system", "content": "be brief"}),
        ({"role": "developer", "content": "x"}, {"role": "system", "content": "x"}),
        ({"role": "assistant", "content": ""}, {"role": "assistant", "content": ""}),
        (
            {"role": "tool", "content": "x", "tool_call_id": "c1"},
            {"role": "tool", "content": "x", "tool_call_id": "c1"},
        ),
        ({**USER, "name": "ann"}, {**USER, "name": "ann"}),
        ({**USER, "type": "text"}, USER),
        (
            {"role": "user", "content": [{"type": "text", "text": t} for t in ("a", "b")]},
            {"role": "user", "content": "ab"},
        ),
        ({"role": "user", "content": []}, {"role": "user", "content": ""}),
    ],
)
def test_each_form_of_a_message_is_read(message: Any, plain: Any) -> None:
    assert read(message).conversation == [plain]


def test_an_answer_may_be_sent_back_as_it_came() -> None:
    came = {
        "role": "assistant",
        "content": "yes",
        "refusal": None,
        "annotations": [],
        "audio": None,
    }
    came |= {"function_call": None, "tool_calls": None}
    assert read(USER, came, USER).conversation[1] == {"role": "assistant", "content": "yes"}


@pytest.mark.parametrize(
    ("message", "param", "says"),
    [
        (SECRET, "messages[1]", "must be an object"),
        ({"content": "x"}, "messages[1].role", "missing"),
        ({"role": "user"}, "messages[1].content", "missing"),
        ({"role": "user", "content": None}, "messages[1].content", "missing"),
        ({"role": "assistant", "content": None}, "messages[1].content", "missing"),
        ({"role": "function", "content": SECRET}, "messages[1].role", "system, developer, user"),
        ({"role": SECRET, "content": "x"}, "messages[1].role", "must be one of"),
        ({"role": "user", "content": 5}, "messages[1].content", "got `int`"),
        ({"role": "user", "content": {"a": SECRET}}, "messages[1].content", "got `object`"),
        ({"role": "user", "content": [SECRET]}, "messages[1].content[0]", "must be an object"),
        ({**USER, "type": "image"}, "messages[1].type", "must be one of text"),
        (
            {**USER, "contents": SECRET},
            "messages[1].contents",
            "did you mean `messages[1].content`",
        ),
        ({**USER, SECRET + "!": 1}, "messages[1]", "unknown field of 26 characters"),
        ({"role": "assistant", "content": "", "refusal": SECRET}, "messages[1].refusal", "support"),
        (
            {"role": "user", "content": [{"type": "text"}] * 1025},
            "messages[1].content",
            "1025 parts",
        ),
    ],
)
def test_a_wrong_message_is_refused_by_its_place(message: Any, param: str, says: str) -> None:
    error = refusal(USER, message)
    assert error.param == param
    assert says in error.message
    assert SECRET not in error.message


@pytest.mark.parametrize(
    ("part", "param"),
    [
        ({"type": "image_url", "image_url": {"url": "http://169.254.169.254/"}}, "type"),
        ({"type": "image_url", "image_url": {"url": "file:///etc/passwd"}}, "type"),
        ({"type": "image_url", "image_url": {"url": "data:image/png;base64,AA=="}}, "type"),
        ({"type": "input_audio", "input_audio": {"data": "", "format": "wav"}}, "type"),
        ({"type": "file", "file": {"file_id": "f"}}, "type"),
        ({"type": "video_url", "video_url": {"url": "http://a\\@b"}}, "type"),
        ({"type": "refusal", "refusal": "no"}, "type"),
        ({"type": 5}, "type"),
        ({"type": [], "text": "a"}, "type"),
        ({"type": None, "text": "a"}, "type"),
        ({"text": "a"}, "type"),
        ({"type": "text"}, "text"),
        ({"type": "text", "text": 5}, "text"),
        ({"type": "text", "text": "a", "image_url": {"url": "x"}}, "image_url"),
        ({"type": "text", "text": "a", "cache_control": "ephemeral"}, "cache_control"),
        ({"type": "text", "text": "a", "texts": "b"}, "texts"),
    ],
)
def test_parts_other_than_text_are_refused_by_their_place(part: Any, param: str) -> None:
    text = {"type": "text", "text": "look:"}
    error = refusal(USER, {"role": "user", "content": [text, part]})
    assert error.param == f"messages[1].content[1].{param}"


def test_the_number_of_messages_is_bounded() -> None:
    assert len(read(*[USER] * 2048).messages) == 2048
    assert "has 2049 messages; the limit is 2048" in refusal(*[USER] * 2049).message
    with pytest.raises(ApiError, match="has 2 messages; the limit is 1"):
        read(USER, USER, limits=RequestLimits(num_messages=1))


@pytest.mark.parametrize("messages", [[], None, "hi", {}, 5])
def test_a_conversation_is_a_list_of_messages(messages: Any) -> None:
    assert refusal(messages=messages).param == "messages"


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"logprobs": 1}, "got `int`"),
        ({"logprobs": True, "top_logprobs": 21}, "is 21"),
        ({"logprobs": True, "top_logprobs": -1}, "is -1"),
        ({"top_logprobs": 5}, "needs `logprobs`"),
        ({"logprobs": False, "top_logprobs": 5}, "needs `logprobs`"),
        ({"reasoning_effort": "huge"}, "must be one of none, minimal"),
        ({"echo": True}, "echo: this server does not support it"),
        ({"best_of": 2}, "best_of: this server does not support it"),
        ({"prompt": "x"}, "unknown field `prompt`"),
        ({"n": 17}, "the limit is 16"),
        ({"min_tokens": -1}, "is -1"),
    ],
)
def test_a_wrong_field_is_refused(fields: dict[str, Any], says: str) -> None:
    assert says in refusal(**fields).message


@pytest.mark.parametrize(
    "fields",
    [
        {"logprobs": True},
        {"logprobs": True, "top_logprobs": 20},
        {"top_logprobs": 0},
        {"logprobs": None, "top_logprobs": None},
        {"reasoning_effort": "high"},
        {"max_completion_tokens": 5},
        {"max_tokens": 5, "max_completion_tokens": 5},
        {"stream": True, "stream_options": {"include_usage": True}},
    ],
)
def test_what_chats_may_say_is_read(fields: dict[str, Any]) -> None:
    request = read(**fields)
    assert all(getattr(request, name) == value for name, value in fields.items() if value is True)
