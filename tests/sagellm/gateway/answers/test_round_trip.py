"""Whatever a model says, openai-python reads it back, wherever the bytes are cut on their way."""

from collections.abc import Iterator, Sequence
from typing import Any

import httpx2
import openai
import pytest
from gateway_calls import event, last
from hypothesis import example, given, settings
from hypothesis import strategies as st

from sagellm.gateway.answers.event_stream import DONE, KEEP_ALIVE
from sagellm.gateway.answers.event_stream import event as sse_event
from sagellm.gateway.answers.forms import ChatForm, CompletionForm
from sagellm.gateway.answers.logprobs import TokenTexts
from sagellm.gateway.answers.writer import AnswerSpec, AnswerWriter, UsageCounter
from sagellm.gateway.api_errors import ApiError
from sagellm.runtime.models.tokenizer import ByteTokenizer
from sagellm.session.requests import Encoded

HARD = ["\r", "\r\n\r\n", "\u2028", "\u2029\x85", "\x0b\x0c\x1c", "\N{GRINNING FACE}", "\x00", ""]
HARD += ["data: [DONE]\n\n", ": keep-alive", "</script>", '"}]}', "\\u2028"]
PIECES = st.lists(st.text(st.characters(exclude_categories=["Cs"])) | st.sampled_from(HARD))
CUTS = st.lists(st.integers(1, 40), min_size=1)


class Bytes(httpx2.SyncByteStream):
    """The content in parts of these sizes, over and over."""

    def __init__(self, content: bytes, sizes: Sequence[int]) -> None:
        self._content, self._sizes = content, sizes

    def __iter__(self) -> Iterator[bytes]:
        content, number = self._content, 0
        while content:
            size = self._sizes[number % len(self._sizes)]
            yield content[:size]
            content, number = content[size:], number + 1


def client(content: bytes, sizes: Sequence[int]) -> openai.OpenAI:
    def answer(request: httpx2.Request) -> httpx2.Response:
        headers = {"content-type": "text/event-stream"}
        return httpx2.Response(200, headers=headers, stream=Bytes(content, sizes))

    http = httpx2.Client(transport=httpx2.MockTransport(answer))
    return openai.OpenAI(api_key="k", base_url="http://gateway/v1", http_client=http, max_retries=0)


def streamed(form: Any, pieces: Sequence[str]) -> bytes:
    asked = AnswerSpec(id="i", created=1, model="m", prompts=(Encoded("p", (1,)),), num_choices=1)
    reply = AnswerWriter(asked, form(asked, TokenTexts(ByteTokenizer())), UsageCounter())
    chunks = [reply.chunks([(0, event(piece))]) for piece in pieces]
    return KEEP_ALIVE.join([*chunks, reply.chunks([(0, last())]) + DONE])


@given(PIECES, CUTS)
@example(HARD, [1])
@settings(max_examples=60)
def test_chats(pieces: list[str], sizes: list[int]) -> None:
    with client(streamed(ChatForm, pieces), sizes) as api:
        stream = api.chat.completions.create(model="m", messages=[], stream=True)
        texts = [chunk.choices[0].delta.content for chunk in stream]
    assert texts == ["", *pieces, ""]


@given(PIECES, CUTS)
@example(HARD, [1])
@settings(max_examples=60)
def test_completions(pieces: list[str], sizes: list[int]) -> None:
    with client(streamed(CompletionForm, pieces), sizes) as api:
        stream = api.completions.create(model="m", prompt="p", stream=True)
        texts = [chunk.choices[0].text for chunk in stream]
    assert texts == [*pieces, ""]


def test_an_error_event_is_an_error_of_the_client():
    told = ApiError(503, "the server is shutting down", code="shutting_down").encoded
    content = streamed(ChatForm, ["a"]).removesuffix(DONE) + sse_event(told) + DONE
    with client(content, [7]) as api, pytest.raises(openai.APIError) as caught:
        list(api.chat.completions.create(model="m", messages=[], stream=True))
    assert caught.value.code == "shutting_down"
