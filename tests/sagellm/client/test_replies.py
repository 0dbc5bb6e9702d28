from typing import Any

import msgspec
import pytest
from scripted_server import text, tool_call, used

from sagellm.client.replies import TextReply, read_body, whole_reply
from sagellm.client.responses import ClientError


def test_a_reply_knows_all_choices_in_order() -> None:
    body = {**text("", "stop"), "usage": used(3, 2)["usage"]}
    body["choices"] = [text("b", "length", 1)["choices"][0], text("a", "stop", 0)["choices"][0]]
    answer = whole_reply(read_body(msgspec.json.encode(body)))
    assert (answer, answer.finish_reason) == ("a", "stop")
    assert [(one, one.finish_reason) for one in answer.choices] == [("a", "stop"), ("b", "length")]


def test_a_message_without_content_is_an_empty_text() -> None:
    body = {"choices": [{"message": {"role": "assistant", "content": None}}]}
    assert whole_reply(read_body(msgspec.json.encode(body))) == ""


def test_an_answer_without_choices_is_an_error() -> None:
    with pytest.raises(ClientError, match="no choice"):
        whole_reply(read_body(b"{}"))


def answered(finish_reason: str | None = "stop", **message: Any) -> TextReply:
    """A reply with this message, of a call that asked for JSON."""
    choice = {"message": {"role": "assistant", **message}, "finish_reason": finish_reason}
    body = {"choices": [choice], "usage": used(3, 2)["usage"]}
    reply = whole_reply(read_body(msgspec.json.encode(body)))
    reply.read_value = msgspec.json.decode
    return reply


@pytest.mark.parametrize("name", ["reasoning", "reasoning_content"])
def test_reasoning_has_two_names(name: str) -> None:
    reply = answered(content="68", **{name: "23 and 45"})
    assert (reply.text, reply.reasoning) == ("68", "23 and 45")
    assert type(reply.text) is str


def test_tool_calls_are_read_and_become_a_message() -> None:
    call = tool_call("get_weather", '{"city": "Paris"}')
    reply = answered("tool_calls", content=None, tool_calls=[call])
    assert (reply.tool_calls[0].name, reply.tool_calls[0].id) == ("get_weather", "call_0")
    assert reply.message == {"role": "assistant", "content": None, "tool_calls": [call]}


@pytest.mark.parametrize("arguments", ['{"city": "Pa', "[]", ""])
def test_arguments_that_are_no_object_are_not_sent_back(arguments: str) -> None:
    reply = answered("tool_calls", tool_calls=[tool_call("f", arguments)])
    assert reply.message["tool_calls"][0]["function"]["arguments"] == "{}"


def test_a_whole_answer_is_parsed() -> None:
    assert answered(content='{"a": 1}').parsed == {"a": 1}


@pytest.mark.parametrize(
    ("reason", "said"),
    [
        ("length", "after 5 characters and 2 tokens with finish_reason 'length'.*raise max_tokens"),
        ("content_filter", "finish_reason 'content_filter', before its JSON was whole$"),
        (None, "has not ended"),
    ],
)
def test_an_answer_that_is_not_whole_says_how_far_it_came(reason: str | None, said: str) -> None:
    with pytest.raises(ClientError, match=said):
        _ = answered(reason, content='{"a":').parsed


def test_a_reply_without_an_answer_has_no_value() -> None:
    with pytest.raises(ClientError, match="it calls f"):
        _ = answered("tool_calls", tool_calls=[tool_call("f", "{}")]).parsed
    with pytest.raises(ClientError, match="asked for no JSON"):
        _ = whole_reply(read_body(msgspec.json.encode(text("{}", "stop")))).parsed
