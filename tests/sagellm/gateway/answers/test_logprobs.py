"""Log probabilities in both APIs, over a scripted bridge."""

from typing import Any

import pytest
from gateway_calls import event, last, playing, post

from sagellm.gateway.answers.logprobs import TokenTexts
from sagellm.gateway.http.endpoints import chat, completions
from sagellm.runtime.messages import TokenLogprob
from sagellm.runtime.models.folder import resolve_model
from sagellm.runtime.models.tokenizer import ByteTokenizer, load_tokenizer

COMPLETION = {"model": "m", "prompt": "hey", "logprobs": 1}
CHAT = {
    "model": "m",
    "messages": [{"role": "user", "content": "hey"}],
    "logprobs": True,
    "top_logprobs": 1,
}
SMILE = "\N{GRINNING FACE}".encode()


def logprob(token: int, value: float = -0.5, top: Any = ((122, -0.1),)) -> TokenLogprob:
    return TokenLogprob(token, value, tuple(top))


def piece(text: str, content: bytes, **fields: Any) -> Any:
    return event(text, num=len(content), logprobs=tuple(map(logprob, content)), **fields)


def pieces() -> Any:
    """A letter, and a face of four tokens."""
    return playing(
        [piece("a", b"a")],
        [piece("", SMILE[:1])],
        [piece("", SMILE[1:2])],
        [piece("\N{GRINNING FACE}b", SMILE[2:] + b"b", finish_reason="stop")],
    )


FACE_TOKENS = [f"bytes:\\x{byte:02x}" for byte in SMILE]


@pytest.mark.parametrize("stream", [True, False])
async def test_completions_have_parallel_lists(stream):
    answered = await post(completions, pieces(), {**COMPLETION, "stream": stream})
    chunks = answered.events if stream else [answered.json]
    lists = [chunk["choices"][0]["logprobs"] for chunk in chunks]
    together = {name: [value for one in lists for value in one[name]] for name in lists[0]}
    assert together["tokens"] == ["a", *FACE_TOKENS, "b"]
    assert together["token_logprobs"] == [-0.5] * 6
    assert together["text_offset"] == [0, 1, 1, 1, 1, 2]
    assert all(
        top == {"z": -0.1, token: -0.5}
        for top, token in zip(together["top_logprobs"], together["tokens"], strict=True)
    )


async def test_the_chosen_token_is_counted_once_where_it_is_among_the_likely():
    chosen = logprob(122, -0.1)
    answered = await post(completions, playing([last("z", logprobs=(chosen,))]), COMPLETION)
    assert answered.json["choices"][0]["logprobs"]["top_logprobs"] == [{"z": -0.1}]


@pytest.mark.parametrize("stream", [True, False])
async def test_echo_has_the_prompt_s_tokens_and_null_for_the_first(stream):
    prompt = (logprob(101, -1.0), logprob(121, -2.0))
    bridge = playing([last("a", logprobs=(logprob(97),), prompt_logprobs=prompt)])
    body = {**COMPLETION, "echo": True, "max_tokens": 1, "stream": stream}
    answered = await post(completions, bridge, body)
    chunk = answered.events[0] if stream else answered.json
    assert bridge.requests[0].sampling.prompt_logprobs == 1
    assert chunk["choices"][0]["logprobs"] == {
        "tokens": ["h", "e", "y", "a"],
        "token_logprobs": [None, -1.0, -2.0, -0.5],
        "top_logprobs": [
            None,
            {"z": -0.1, "e": -1.0},
            {"z": -0.1, "y": -2.0},
            {"z": -0.1, "a": -0.5},
        ],
        "text_offset": [0, 1, 2, 3],
    }


@pytest.mark.parametrize("stream", [True, False])
async def test_chats_have_a_list_with_bytes(stream):
    answered = await post(chat, pieces(), {**CHAT, "stream": stream})
    chunks = answered.events[1:] if stream else [answered.json]
    content = [entry for chunk in chunks for entry in chunk["choices"][0]["logprobs"]["content"]]
    assert content[0] == {
        "token": "a",
        "logprob": -0.5,
        "bytes": [97],
        "top_logprobs": [{"token": "z", "logprob": -0.1, "bytes": [122]}],
    }
    assert [entry["token"] for entry in content[1:5]] == FACE_TOKENS
    assert bytes(byte for entry in content for byte in entry["bytes"]) == b"a" + SMILE + b"b"


@pytest.mark.parametrize(
    ("endpoint", "body"),
    [
        (completions, {"prompt": "hey"}),
        (chat, {"messages": CHAT["messages"]}),
    ],
)
async def test_unasked_they_are_null(endpoint, body):
    answered = await post(endpoint, playing([last("a")]), body)
    assert answered.json["choices"][0]["logprobs"] is None


async def test_what_cannot_be_is_as_low_as_json_goes():
    bridge = playing([last("a", logprobs=(logprob(97, float("-inf")),))])
    answered = await post(completions, bridge, COMPLETION)
    assert answered.json["choices"][0]["logprobs"]["token_logprobs"] == [-9999.0]


def test_texts_of_tokens_of_a_real_vocabulary():
    tokenizer = load_tokenizer(resolve_model("sage-tiny"))
    texts = TokenTexts(tokenizer)
    text = "na\u00efve \N{GRINNING FACE}!"
    token_ids = tokenizer.encode(text)
    assert b"".join(texts.bytes(token) for token in token_ids) == text.encode()
    assert texts.text(tokenizer.eos_token_ids[0]) == "<|end|>"
    assert texts.text(10**6) == ""


def test_texts_are_looked_up_once():
    class Counting(ByteTokenizer):
        num = 0

        def token_bytes(self, token_id: int) -> bytes:
            self.num += 1
            return super().token_bytes(token_id)

    tokenizer = Counting()
    texts = TokenTexts(tokenizer)
    assert [texts.text(97), texts.text(97), texts.bytes(97)] == ["a", "a", b"a"]
    assert tokenizer.num == 1
