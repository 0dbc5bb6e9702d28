from typing import Any

import msgspec
import pytest
from scripted_server import delta, text, used

from sagellm.client.replies import read_body
from sagellm.client.reply_streams import ChunkReader, chunk_pieces
from sagellm.client.responses import BAD_ANSWER, CUT_OFF, ClientError


def stream(*data: Any, end: bool = True) -> tuple[list[str], ClientError | None]:
    """The texts that a stream of these events yields, and the error after them."""
    reader, found = ChunkReader(), []
    for one in data:
        raw = one.encode() if isinstance(one, str) else msgspec.json.encode(one)
        reader.feed(b"data: " + raw + b"\n\n")
    if end:
        reader.end()
    try:
        while (body := reader.next()) is not None:
            found += chunk_pieces(body)
    except ClientError as error:
        return found, error
    return found, None


def test_a_stream_ends_with_done() -> None:
    assert stream(text("a"), text("b", "stop"), "[DONE]") == (["a", "b"], None)


def test_a_stream_may_end_without_done_once_every_choice_has() -> None:
    assert stream(text("a", "stop")) == (["a"], None)


def test_the_chunk_that_opens_a_chat_is_no_piece() -> None:
    opening, ending = delta("", role="assistant"), delta(None, "stop")
    assert stream(opening, delta("a"), ending, "[DONE]") == (["a", ""], None)


@pytest.mark.parametrize("last", [(), ("[DONE]",)])
def test_a_stream_without_finish_reason_is_cut_off(last: tuple[str, ...]) -> None:
    found, error = stream(text("a"), *last)
    assert found == ["a"]
    assert error is not None
    assert error.code == CUT_OFF


def test_each_choice_must_end() -> None:
    _, error = stream(text("a", index=1), text("b", "stop"), "[DONE]")
    assert error is not None


@pytest.mark.parametrize("data", [(), ("[DONE]",), (used(1, 0), "[DONE]")])
def test_a_stream_without_any_choice_is_cut_off(data: tuple[Any, ...]) -> None:
    _, error = stream(*data)
    assert error is not None
    assert error.code == CUT_OFF


def test_an_error_inside_a_stream_is_raised_behind_what_came() -> None:
    failed = {"error": {"message": "engine died", "type": "server_error", "code": 500}}
    found, error = stream(text("a"), failed, "[DONE]")
    assert found == ["a"]
    assert error is not None
    assert (error.message, error.status, error.type) == ("engine died", 500, "server_error")


@pytest.mark.parametrize("data", ['{"message": "gone"}', '{"error": {"message": "gone"}}'])
def test_an_error_may_be_a_named_event(data: str) -> None:
    reader = ChunkReader()
    reader.feed(f"event: error\ndata: {data}\n\n".encode())
    with pytest.raises(ClientError, match=r"^gone$"):
        reader.next()
    assert reader.is_over


@pytest.mark.parametrize("data", ["{", '"a"', "[]", '{"choices": 3}', '{"choices": [{"text": 1}]}'])
def test_what_is_no_chunk_is_said(data: str) -> None:
    found, error = stream(text("a"), data)
    assert found == ["a"]
    assert error is not None
    assert error.code == BAD_ANSWER


def test_a_chunk_that_is_no_utf8_is_said() -> None:
    reader = ChunkReader()
    reader.feed(b'data: {"choices": [{"text": "\xff"}]}\n\n')
    with pytest.raises(ClientError, match="makes no sense"):
        reader.next()


def test_what_follows_done_is_not_read() -> None:
    assert stream(text("a", "stop"), "[DONE]", "{") == (["a"], None)


def test_usage_is_with_the_last_piece_of_its_chunk() -> None:
    (last,) = chunk_pieces(read_body(msgspec.json.encode({**text("a", "stop"), **_usage()})))
    assert last.usage is not None
    assert (last, last.finish_reason, last.usage.completion_tokens) == ("a", "stop", 2)


def test_usage_without_a_choice_is_a_piece_without_text() -> None:
    (alone,) = chunk_pieces(read_body(msgspec.json.encode(used(3, 2))))
    assert alone == ""
    assert alone.usage is not None
    assert alone.usage.prompt_tokens == 3


def _usage() -> dict[str, Any]:
    return {"usage": used(3, 2)["usage"]}
