"""Fields of evaluations over a scripted bridge: prompts' logprobs, prompts alone, tokens by id."""

from typing import Any

import pytest
from gateway_calls import event, last, playing, post

from sagellm.gateway.http.endpoints import chat, completions
from sagellm.runtime.messages import TokenLogprob

COMPLETION = {"model": "m", "prompt": "hey"}
CHAT = {"model": "m", "messages": [{"role": "user", "content": "h"}]}  # "user: h\n"
BOTH = pytest.mark.parametrize(("endpoint", "body"), [(completions, COMPLETION), (chat, CHAT)])
STREAMED = pytest.mark.parametrize("stream", [True, False])


def scored(token: int, rank: int = 2) -> TokenLogprob:
    """Two others are more likely, or one."""
    return TokenLogprob(token, -1.0, ((122, -0.1), (token, -1.0), (255, float("-inf"))), rank)


def first(text: str, **fields: Any) -> Any:
    """A choice's first event, with the scores of either prompt."""
    prompt = tuple(map(scored, text.encode()[1:]))
    return event("a", prompt_logprobs=prompt, logprobs=(scored(97),), **fields)


def bridge(text: str = "hey", num_choices: int = 1) -> Any:
    end = {"logprobs": (scored(98),)}
    return playing(
        [first(text, choice=choice) for choice in range(num_choices)],
        [last("b", choice=choice, **end) for choice in range(num_choices)],
    )


def entry(token: int, num_top: int) -> dict[str, Any]:
    """As vLLM writes it: the prompt's own token, then the likely ones."""
    others = {
        "122": {"logprob": -0.1, "rank": 1, "decoded_token": "z"},
        str(token): {"logprob": -1.0, "rank": 2, "decoded_token": chr(token)},
        "255": {"logprob": -9999.0, "rank": 3, "decoded_token": "\N{REPLACEMENT CHARACTER}"},
    }
    own = {str(token): others[str(token)]}
    return own | {name: others[name] for name in [*others][:num_top]}


def shown(answered: Any) -> list[Any]:
    """Where an answer has the field: in its choices, or beside them."""
    parts = [part for chunk in answered for part in (chunk, *chunk["choices"])]
    return [part["prompt_logprobs"] for part in parts if "prompt_logprobs" in part]


@STREAMED
@pytest.mark.parametrize("num_top", [0, 1, 3])
async def test_a_completion_has_the_prompt_s_logprobs_in_each_choice(stream, num_top):
    body = {**COMPLETION, "n": 2, "stream": stream, "prompt_logprobs": num_top}
    answered = await post(completions, bridge(num_choices=2), body)
    right = [None, entry(101, num_top), entry(121, num_top)]
    chunks = answered.events if stream else [answered.json]
    assert shown(chunks) == [right, right]
    assert all("prompt_logprobs" not in chunk for chunk in chunks)
    assert next(iter(shown(chunks)[0][1])) == "101"


@STREAMED
async def test_a_chat_has_them_once(stream):
    text = "user: h\n"
    body = {**CHAT, "n": 2, "stream": stream, "prompt_logprobs": 1}
    answered = await post(chat, bridge(text, 2), body)
    right = [None, *(entry(token, 1) for token in text.encode()[1:])]
    chunks = answered.events if stream else [answered.json]
    assert [chunk["prompt_logprobs"] for chunk in chunks if "prompt_logprobs" in chunk] == [right]
    assert shown(chunks) == [right]


@BOTH
@STREAMED
async def test_unasked_there_are_none(endpoint, body, stream):
    answered = await post(endpoint, bridge(), {**body, "stream": stream, "n": 1})
    assert b"prompt_logprobs" not in answered.body


@BOTH
async def test_an_engine_that_scores_nothing_says_null(endpoint, body):
    answered = await post(endpoint, playing([last("a")]), {**body, "prompt_logprobs": 0})
    (found,) = shown([answered.json])
    assert set(found) == {None}


async def test_an_echo_and_the_prompt_s_logprobs_each_show_as_many_as_asked():
    body = {**COMPLETION, "echo": True, "logprobs": 1, "prompt_logprobs": 3}
    opened = bridge()
    choice = (await post(completions, opened, body)).json["choices"][0]
    assert opened.requests[0].sampling.prompt_logprobs == 3
    assert choice["prompt_logprobs"][1] == entry(101, 3)
    assert choice["logprobs"]["top_logprobs"][1:3] == [
        {"z": -0.1, "e": -1.0},
        {"z": -0.1, "y": -1.0},
    ]


@STREAMED
@pytest.mark.parametrize("reason", ["stop", "length"])
async def test_a_prompt_alone_is_echoed_and_scored(stream, reason):
    """As lm-eval asks for it. The engine's one token is neither shown nor counted."""
    ends = {"logprobs": (scored(97),), "stop_reason": 7}
    prompt = (scored(101), scored(121))
    opened = playing([last("a", reason, prompt_logprobs=prompt, **ends)])
    body = {**COMPLETION, "max_tokens": 0, "echo": True, "logprobs": 1, "stream": stream}
    body |= {"return_token_ids": True, "stream_options": {"include_usage": True}}
    answered = await post(completions, opened, body)
    chunks = answered.events if stream else [answered.json]
    (choice,) = [choice for chunk in chunks for choice in chunk["choices"]]
    assert opened.requests[0].sampling.max_tokens == 1
    assert (choice["text"], choice["finish_reason"], choice["stop_reason"]) == (
        "hey",
        "length",
        None,
    )
    assert (choice["prompt_token_ids"], choice["token_ids"]) == ([104, 101, 121], [])
    assert choice["logprobs"]["tokens"] == ["h", "e", "y"]
    assert choice["logprobs"]["token_logprobs"] == [None, -1.0, -1.0]
    usage = chunks[-1]["usage"]
    assert (usage["prompt_tokens"], usage["completion_tokens"]) == (3, 0)


@pytest.mark.parametrize("fields", [{}, {"echo": False}, {"max_completion_tokens": 0}])
async def test_no_tokens_without_an_echo_are_refused(fields):
    answered = await post(completions, bridge(), {**COMPLETION, "max_tokens": 0, **fields})
    assert answered.status == 400
    assert answered.json["error"]["param"] in ("max_tokens", "max_completion_tokens")


@STREAMED
async def test_tokens_of_a_completion_by_their_ids(stream):
    body = {**COMPLETION, "echo": True, "logprobs": 1, "return_tokens_as_token_ids": True}
    answered = await post(completions, bridge(), {**body, "stream": stream})
    chunks = answered.events if stream else [answered.json]
    found = [chunk["choices"][0]["logprobs"] for chunk in chunks]
    names = [f"token_id:{token}" for token in (104, 101, 121, 97, 98)]
    assert [token for one in found for token in one["tokens"]] == names
    offsets = [offset for one in found for offset in one["text_offset"]]
    assert offsets == [0, 1, 2, 3, 4]
    tops = [top for one in found for top in one["top_logprobs"]]
    assert tops[1] == {"token_id:122": -0.1, "token_id:101": -1.0}


@STREAMED
async def test_tokens_of_a_chat_by_their_ids(stream):
    body = {**CHAT, "logprobs": True, "top_logprobs": 1, "return_tokens_as_token_ids": True}
    answered = await post(chat, bridge("user: h\n"), {**body, "stream": stream})
    choices = [chunk["choices"][0] for chunk in (answered.events if stream else [answered.json])]
    found = [
        one for choice in choices for one in (choice.get("logprobs") or {"content": []})["content"]
    ]
    assert [one["token"] for one in found] == ["token_id:97", "token_id:98"]
    assert [bytes(one["bytes"]) for one in found] == [b"a", b"b"]


@BOTH
async def test_bad_words_enter_as_tokens(endpoint, body):
    opened = bridge()
    await post(endpoint, opened, {**body, "bad_words": ["no", " yes"], "allowed_token_ids": [9, 8]})
    sampling = opened.requests[0].sampling
    assert sampling.bad_words_token_ids == (tuple(b"no"), tuple(b"yes"))
    assert (sampling.bad_words, sampling.allowed_token_ids) == ((), (8, 9))


@BOTH
@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"allowed_token_ids": [256]}, "allowed_token_ids"),
        ({"allowed_token_ids": []}, "allowed_token_ids"),
        ({"bad_words": [""]}, "bad_words[0]"),
        ({"bad_words": ["x" * 257]}, "bad_words[0]"),
        ({"bad_words": ["x"] * 129}, "bad_words"),
        ({"prompt_logprobs": -1}, "prompt_logprobs"),
        ({"prompt_logprobs": 21}, "prompt_logprobs"),
        ({"return_tokens_as_token_ids": 1}, "return_tokens_as_token_ids"),
    ],
)
async def test_what_cannot_be_is_refused_by_name(endpoint, body, fields, param):
    answered = await post(endpoint, bridge(), {**body, **fields})
    assert (answered.status, answered.json["error"]["param"]) == (400, param)
