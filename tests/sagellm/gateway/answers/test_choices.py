"""Choices and prompts of one call: indices, echo, ids, usage, and one text however it is sent."""

from typing import Any

import msgspec
import pytest
from gateway_calls import Client, ScriptedBridge, event, gateway_before, last, playing, post

from sagellm.gateway.answers.objects import ChatCompletion, Completion
from sagellm.gateway.http.endpoints import chat, completions
from sagellm.runtime.engine.output import IncrementalDetokenizer
from sagellm.runtime.messages import Request as GraphRequest
from sagellm.runtime.models.tokenizer import ByteTokenizer

COMPLETION = {"model": "m", "prompt": "hey"}
CHAT = {"model": "m", "messages": [{"role": "user", "content": "hey"}]}
BOTH = pytest.mark.parametrize(("endpoint", "body"), [(completions, COMPLETION), (chat, CHAT)])
TEXT = 'a \N{GRINNING FACE} "q" \\ \n\r\t \u2028 \x85 \x00 data: [DONE]\n\n \N{PILE OF POO}'


def token_by_token(text: str) -> list[Any]:
    """A batch for each byte of the text, as an engine gives them out."""
    detokenizer = IncrementalDetokenizer(ByteTokenizer().decode)
    encoded = text.encode()
    batches = [
        [event(detokenizer.push(byte), num=1, position=number)]
        for number, byte in enumerate(encoded)
    ]
    return [*batches, [last(detokenizer.flush())]]


def whole_text(answer: Any) -> str:
    choice = answer["choices"][0]
    return choice["text"] if "text" in choice else choice["message"]["content"]


@BOTH
async def test_streamed_and_whole_are_one_text(endpoint, body):
    whole = await post(endpoint, playing(*token_by_token(TEXT)), body)
    streamed = await post(endpoint, playing(*token_by_token(TEXT)), {**body, "stream": True})
    assert whole_text(whole.json) == TEXT
    assert streamed.text() == TEXT
    assert len(streamed.deltas) >= len(TEXT.encode())


@BOTH
async def test_no_client_sees_a_line_end_inside_an_event(endpoint, body):
    streamed = await post(endpoint, playing(*token_by_token(TEXT)), {**body, "stream": True})
    lines = [line for line in streamed.body.decode().splitlines() if line]
    assert all(line.startswith("data: ") for line in lines)


@BOTH
async def test_a_whole_answer_has_every_field(endpoint, body):
    answered = await post(endpoint, playing([event("a")], [last("b", stop_reason=5)]), body)
    form = Completion if endpoint is completions else ChatCompletion
    read = msgspec.json.decode(answered.body, type=form)
    assert answered.headers["content-type"] == "application/json"
    assert (read.usage.prompt_tokens, read.usage.completion_tokens) == (3, 2)
    assert (read.model, read.choices[0].finish_reason, read.choices[0].stop_reason) == (
        "m",
        "stop",
        5,
    )


@BOTH
@pytest.mark.parametrize("stream", [True, False])
async def test_n_choices_have_their_indices(endpoint, body, stream):
    bridge = playing(
        [event("b", choice=1)], [last("B", choice=1), event("a")], [last("A", choice=0)]
    )
    answered = await post(endpoint, bridge, {**body, "n": 2, "stream": stream})
    assert bridge.requests[0].sampling.n == 2
    if stream:
        assert (answered.text(0), answered.text(1)) == ("aA", "bB")
    else:
        assert [choice["index"] for choice in answered.json["choices"]] == [0, 1]
        assert whole_text(answered.json) == "aA"
        assert answered.json["usage"]["completion_tokens"] == 4
        assert answered.json["usage"]["prompt_tokens"] == 3


async def test_the_cache_is_what_the_first_choice_found():
    """The others find what the first has left."""
    second = event("b", choice=1, num_cached_tokens=3)
    ends = [last("c", num_cached_tokens=0), last("d", choice=1)]
    bridge = playing([second, event("a", num_cached_tokens=1)], ends)
    answered = await post(completions, bridge, {**COMPLETION, "n": 2})
    assert answered.json["usage"]["prompt_tokens_details"]["cached_tokens"] == 1


async def test_a_choice_that_fails_ends_the_others():
    bridge = playing([event("a"), event("b", choice=1)], [last("", "failed", choice=1)])
    answered = await post(completions, bridge, {**COMPLETION, "n": 2})
    assert answered.status == 500
    assert bridge.left == ["abc"]


def echoing(request: GraphRequest) -> Any:
    """Each choice says its prompt and its number."""
    numbers = range(request.sampling.n)
    first = [event(request.prompt, choice=number) for number in numbers]
    return [first, *[[last(str(number), choice=number)] for number in numbers]]


PROMPTS = ["x", "yy"], [[120], [121, 121]]


@pytest.mark.parametrize("prompt", PROMPTS)
def test_several_prompts_have_indices_one_after_the_other(run, prompt):
    body = {"model": "m", "prompt": prompt, "n": 2}
    whole = run(lambda: post(completions, ScriptedBridge(echoing), body)).json
    streamed = run(lambda: post(completions, ScriptedBridge(echoing), {**body, "stream": True}))
    texts = ["x0", "x1", "yy0", "yy1"]
    assert [choice["text"] for choice in whole["choices"]] == texts
    assert [choice["index"] for choice in whole["choices"]] == [0, 1, 2, 3]
    assert [streamed.text(index) for index in range(4)] == texts
    assert whole["usage"]["prompt_tokens"] == 6
    assert whole["usage"]["prompt_tokens_details"] == {"cached_tokens": 4}


async def test_requests_of_one_call_have_ids_of_their_own():
    bridge = ScriptedBridge(echoing)
    await post(completions, bridge, {"prompt": ["x", "yy"]})
    assert sorted(request.request_id for request in bridge.requests) == ["abc/0", "abc/1"]
    assert sorted(bridge.left) == ["abc/0", "abc/1"]


@pytest.mark.parametrize("stream", [True, False])
def test_one_refused_prompt_ends_the_others(run, stream):
    def play(request: GraphRequest) -> Any:
        return [[last("", "refused", code="queue_full")]] if request.prompt == "yy" else []

    async def ask() -> Any:
        bridge = ScriptedBridge(play)
        client = Client({"prompt": ["x", "yy"], "stream": stream})
        return bridge, await client.call(completions, gateway_before(bridge))

    bridge, answered = run(ask)
    assert answered.status == 503
    assert sorted(bridge.left) == ["abc/0", "abc/1"]


@pytest.mark.parametrize("stream", [True, False])
async def test_echo_begins_each_choice_with_the_prompt(stream):
    bridge = playing([event("a"), event("b", choice=1)], [last("c"), last("d", choice=1)])
    answered = await post(
        completions, bridge, {**COMPLETION, "echo": True, "n": 2, "stream": stream}
    )
    if stream:
        assert (answered.text(0), answered.text(1)) == ("heyac", "heybd")
    else:
        assert [choice["text"] for choice in answered.json["choices"]] == ["heyac", "heybd"]


async def test_echo_of_token_ids_is_their_text():
    answered = await post(completions, playing([last("a")]), {"prompt": list(b"hey"), "echo": True})
    assert answered.json["choices"][0]["text"] == "heya"


async def test_token_ids_are_returned_where_asked_for():
    body = {**COMPLETION, "return_token_ids": True}
    whole = (await post(completions, playing([event("a")], [last("b")]), body)).json["choices"][0]
    assert whole["token_ids"] == list(b"ab")
    assert whole["prompt_token_ids"] == list(b"hey")
    bridge = playing([event("a")], [last("b")])
    streamed = (await post(completions, bridge, {**body, "stream": True})).events
    first, second = (chunk["choices"][0] for chunk in streamed)
    assert (first["token_ids"], first["prompt_token_ids"]) == ([97], list(b"hey"))
    assert second["token_ids"] == [98]
    assert "prompt_token_ids" not in second


async def test_token_ids_of_a_chat():
    body = {**CHAT, "return_token_ids": True}
    whole = (await post(chat, playing([last("ab")]), body)).json
    assert whole["choices"][0]["token_ids"] == list(b"ab")
    assert whole["prompt_token_ids"] == list(b"user: hey\n")
    streamed = (await post(chat, playing([last("ab")]), {**body, "stream": True})).events
    assert streamed[0]["prompt_token_ids"] == list(b"user: hey\n")
    assert streamed[1]["choices"][0]["token_ids"] == list(b"ab")
    assert "prompt_token_ids" not in streamed[1]


async def test_a_graph_may_make_more_choices_than_were_asked_for():
    bridge = playing([last("a")], [last("b", choice=1)])
    answered = await post(completions, bridge, {**COMPLETION, "stream": True})
    assert (answered.text(0), answered.text(1)) == ("a", "b")
