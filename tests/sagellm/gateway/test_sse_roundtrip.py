"""A stream as it leaves the endpoints says the same to every reader of server-sent events."""

import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import anyio
import openai._streaming as openai_streaming
import pytest
from gateway_calls import event, last, playing, post
from hypothesis import example, given, settings
from hypothesis import strategies as st

from sagellm.client.responses import EventReader
from sagellm.gateway.http.endpoints import chat, completions

HARD = ["\r", "\n\n", "\r\n\r\n", "\u2028", "\u2029\x85", "\x0b\x0c\x1c\x1d\x1e", "\x00", "\ufeff"]
HARD += ["\N{GRINNING FACE}", "data: [DONE]\n\n", ": x\n", "id: 1\n", '"}]}\n\n', "\\u2028", "\\"]
TEXTS = st.text(st.characters(exclude_categories=["Cs"]), min_size=1) | st.sampled_from(HARD)
PIECES = st.lists(st.tuples(st.integers(0, 2), TEXTS), max_size=12)
SIZES = st.lists(st.integers(1, 60), min_size=1, max_size=5)


def cut(content: bytes, sizes: Sequence[int]) -> Iterator[bytes]:
    """The content in parts of these sizes, over and over."""
    number = 0
    while content:
        size = sizes[number % len(sizes)]
        yield content[:size]
        content, number = content[size:], number + 1


def by_openai(parts: Iterator[bytes]) -> list[str]:
    return [found.data for found in openai_streaming.SSEDecoder().iter_bytes(parts)]


def by_us(parts: Iterator[bytes]) -> list[str]:
    reader = EventReader()
    return [found.data.decode() for part in parts for found in reader.feed(part)]


def by_unicode_lines(parts: Iterator[bytes]) -> list[str]:
    """As clients do that split at whatever Unicode calls a line."""
    lines = b"".join(parts).decode().splitlines()
    assert all(not line or line.startswith("data: ") for line in lines)
    return [line.removeprefix("data: ") for line in lines if line]


READERS: list[Callable[[Iterator[bytes]], list[str]]] = [by_openai, by_us, by_unicode_lines]


def said(pieces: Sequence[tuple[int, str]], endpoint: Any, **body: Any) -> bytes:
    """What a client is sent where the choices of a model say these pieces."""
    batches = [[event(text, choice=choice)] for choice, text in pieces]
    ends = [last(choice=choice) for choice in range(3)]
    wanted = {"stream": True, "n": 3, **body}
    return anyio.run(post, endpoint, playing(*batches, ends), wanted, backend="trio").body


def texts(data: Sequence[str], content_of: Callable[[Any], str | None]) -> list[str]:
    """What each choice said; the stream is whole and every event is JSON."""
    assert data[-1] == "[DONE]"
    found = [""] * 3
    for one in data[:-1]:
        for choice in json.loads(one)["choices"]:
            found[choice["index"]] += content_of(choice) or ""
    return found


def expected(pieces: Sequence[tuple[int, str]]) -> list[str]:
    return ["".join(text for choice, text in pieces if choice == number) for number in range(3)]


@pytest.mark.parametrize("read", READERS)
@given(pieces=PIECES, sizes=SIZES)
@example(pieces=[(0, text) for text in HARD], sizes=[1])
@settings(max_examples=25)
def test_chats(
    read: Callable[[Iterator[bytes]], list[str]], pieces: list[tuple[int, str]], sizes: list[int]
) -> None:
    content = said(pieces, chat, messages=[{"role": "user", "content": "x"}])
    data = read(cut(content, sizes))
    assert texts(data, lambda choice: choice["delta"].get("content")) == expected(pieces)


@pytest.mark.parametrize("read", READERS)
@given(pieces=PIECES, sizes=SIZES)
@example(pieces=[(0, text) for text in HARD], sizes=[1])
@settings(max_examples=25)
def test_completions(
    read: Callable[[Iterator[bytes]], list[str]], pieces: list[tuple[int, str]], sizes: list[int]
) -> None:
    data = read(cut(said(pieces, completions, prompt="x"), sizes))
    assert texts(data, lambda choice: choice["text"]) == expected(pieces)
