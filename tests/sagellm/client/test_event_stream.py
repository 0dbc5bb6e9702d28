import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sagellm.client.responses import EventReader, EventTooLong, ServerSentEvent


def read(*chunks: bytes) -> list[ServerSentEvent]:
    reader = EventReader()
    return [event for chunk in chunks for event in reader.feed(chunk)]


def data(*chunks: bytes) -> list[bytes]:
    return [event.data for event in read(*chunks)]


def test_an_event_ends_with_an_empty_line() -> None:
    assert data(b"data: a\n", b"\ndata: b\n\n") == [b"a", b"b"]


@pytest.mark.parametrize("end", [b"\n", b"\r\n", b"\r"])
def test_lines_end_in_three_ways(end: bytes) -> None:
    assert data(end.join([b"data: a", b"data: b", b"", b"data: c", b"", b""])) == [b"a\nb", b"c"]


def test_a_crlf_may_be_cut_in_two() -> None:
    assert data(b"data: a\r", b"\ndata: b\r", b"\n\r", b"\n") == [b"a\nb"]


def test_comments_ids_and_unknown_fields_are_skipped() -> None:
    assert data(b": keep-alive\n\n", b"id: 7\nretry: 5\nfoo: x\ndata: a\n\n") == [b"a"]


def test_an_event_may_have_a_name() -> None:
    assert read(b"event: error\ndata: {}\n\ndata: a\n\n") == [
        ServerSentEvent(b"{}", "error"),
        ServerSentEvent(b"a"),
    ]


def test_one_space_behind_the_colon_is_no_data() -> None:
    assert data(b"data:a\n\ndata:  b\n\ndata\n\n") == [b"a", b" b", b""]


def test_a_byte_order_mark_is_skipped_even_cut() -> None:
    assert data(b"\xef", b"\xbb\xbfdata: a\n\n") == [b"a"]
    assert data(b"data: \xef\xbb\xbfa\n\n") == [b"\xef\xbb\xbfa"]


def test_what_unicode_calls_a_line_end_is_text() -> None:
    text = "a\u2028b\u2029c\u0085d\x0be\x0cf\x1cg"
    assert data(f"data: {text}\n\n".encode()) == [text.encode()]


def test_an_event_that_has_not_ended_is_none() -> None:
    assert data(b"data: a\n\ndata: b\n") == [b"a"]


@pytest.mark.parametrize("chunk", [b"data: x" * 9, b"data: x\n" * 9])
def test_an_event_without_end_is_refused(chunk: bytes) -> None:
    reader = EventReader(largest=40)
    with pytest.raises(EventTooLong, match="40 bytes"):
        reader.feed(chunk)


def test_many_short_events_are_not_one_long_one() -> None:
    reader = EventReader(largest=20)
    assert len(reader.feed(b"data: x\n\n" * 100)) == 100


@given(st.lists(st.text()), st.lists(st.integers(1, 7)), st.sampled_from(["\n", "\r\n", "\r"]))
def test_events_come_back_however_they_are_cut(texts: list[str], cuts: list[int], end: str) -> None:
    dumped = [json.dumps(text, ensure_ascii=False) for text in texts]
    body = "".join(f": c{end}data: {one}{end}{end}" for one in dumped)
    raw, chunks, sizes = body.encode(errors="surrogatepass"), [], iter(cuts)
    while raw:
        size = next(sizes, len(raw))
        chunks.append(raw[:size])
        raw = raw[size:]
    wanted = [one.encode(errors="surrogatepass") for one in dumped]
    assert data(*chunks) == wanted
