import msgspec
import pytest
from scripted_server import text, used

from sagellm.client.replies import read_body, whole_reply
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
