from typing import Any

import msgspec
import pytest
from scripted_server import delta, text, used

from sagellm.client.replies import Piece, Usage, read_body
from sagellm.client.reply_streams import ChunkReader, ReplyStream, chunk_pieces
from sagellm.client.responses import BAD_ANSWER, CUT_OFF, ClientError


def stream(*data: Any, end: bool = True) -> tuple[list[object], ClientError | None]:
    """The texts that a stream of these events yields, and the error after them."""
    reader, found = ChunkReader(), list[object]()
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
    (last,) = pieces_of({**text("a", "stop"), **_usage()})
    assert last.usage is not None
    assert (last, last.finish_reason, last.usage.completion_tokens) == ("a", "stop", 2)


def test_usage_without_a_choice_is_no_piece() -> None:
    stream = read_stream(text("a", "stop"), used(3, 2))
    assert [choice.text for choice in stream.reply.choices] == ["a"]
    assert stream.usage == Usage(3, 2, 5)


def _usage() -> dict[str, Any]:
    return {"usage": used(3, 2)["usage"]}


def pieces_of(chunk: Any) -> list[Piece]:
    pieces = chunk_pieces(read_body(msgspec.json.encode(chunk)))
    return [piece for piece in pieces if isinstance(piece, Piece)]


def read_stream(*chunks: Any) -> ReplyStream:
    """A stream of these chunks, read to its end."""
    pieces = [
        piece for chunk in chunks for piece in chunk_pieces(read_body(msgspec.json.encode(chunk)))
    ]
    stream: ReplyStream = ReplyStream(iter(pieces), lambda: None)
    list(stream)
    return stream


def part_of_call(index: int, **function: str) -> dict[str, Any]:
    """A chunk of a tool call. Its first chunk, which has the name, has the id too."""
    first = {"id": f"call_{index}"} if "name" in function else {}
    return delta(None, tool_calls=[{"index": index, **first, "function": function}])


def test_reasoning_and_calls_are_pieces_without_text() -> None:
    (thought,) = pieces_of(delta("", role="assistant", reasoning="hm"))
    (call,) = pieces_of(part_of_call(0, name="f"))
    assert (thought, thought.reasoning) == ("", "hm")
    assert (call, call.tool_calls[0].name) == ("", "f")


def test_a_stream_gathers_the_whole_reply() -> None:
    stream = read_stream(
        delta("", role="assistant"),
        delta(None, reasoning="23 "),
        delta(None, reasoning="and 45"),
        delta("6"),
        delta("8", "stop"),
        used(3, 2),
    )
    reply = stream.reply
    assert (reply, reply.reasoning, reply.finish_reason) == ("68", "23 and 45", "stop")
    assert reply.usage is not None
    assert reply.usage.completion_tokens == 2


def test_the_parts_of_each_call_are_joined() -> None:
    stream = read_stream(
        part_of_call(0, name="f", arguments=""),
        part_of_call(0, arguments='{"a":'),
        part_of_call(1, name="g", arguments="{}"),
        part_of_call(0, arguments="1}"),
        delta(None, "tool_calls"),
    )
    calls = [(call.id, call.name, call.arguments) for call in stream.reply.tool_calls]
    assert calls == [("call_0", "f", '{"a":1}'), ("call_1", "g", "{}")]


def test_every_choice_is_gathered() -> None:
    stream = read_stream(text("b", "length", 1), text("a", "stop", 0))
    ends = [(each.text, each.finish_reason) for each in stream.reply.choices]
    assert ends == [("a", "stop"), ("b", "length")]
    assert stream.finish_reason == "stop"


def test_a_stream_is_parsed_at_its_end_only() -> None:
    stream = read_stream(delta('{"a":'), delta("1}", "stop"))
    stream.read_value = msgspec.json.decode
    assert stream.parsed == {"a": 1}
    unread = read_stream(delta('{"a":'))
    unread.read_value = msgspec.json.decode
    with pytest.raises(ClientError, match="read the stream first"):
        _ = unread.parsed
