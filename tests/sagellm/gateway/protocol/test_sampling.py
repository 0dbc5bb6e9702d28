"""What depends on the model: ids, the context, defaults, and how log probabilities are asked."""

import json
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sagellm.gateway.api_errors import ApiError
from sagellm.gateway.protocol.bodies import (
    ChatRequest,
    CompletionRequest,
    read_chat,
    read_completion,
)
from sagellm.gateway.protocol.sampling_params import ModelBounds, check_ids, kept_ids, sampling_of
from sagellm.gateway.settings import RequestLimits
from sagellm.runtime.sampling import Sampling

FACTS = ModelBounds(vocab_size=100, max_model_len=64)


def completion(**fields: Any) -> CompletionRequest:
    return read_completion(json.dumps({"prompt": "hi", **fields}).encode(), RequestLimits())


def chat(**fields: Any) -> ChatRequest:
    said = {"messages": [{"role": "user", "content": "hi"}], **fields}
    return read_chat(json.dumps(said).encode(), RequestLimits())


def refusal(request: CompletionRequest | ChatRequest, num_prompt_tokens: int = 4) -> ApiError:
    with pytest.raises(ApiError) as caught:
        sampling_of(request, FACTS, num_prompt_tokens)
    assert caught.value.status == 400
    return caught.value


def test_defaults_are_those_of_the_api() -> None:
    assert sampling_of(completion(), FACTS, 4) == Sampling(max_tokens=16, temperature=1.0)
    assert sampling_of(chat(), FACTS, 4) == Sampling(max_tokens=60, temperature=1.0)


def test_everything_that_is_said_reaches_the_engine() -> None:
    said: dict[str, Any] = {
        "max_tokens": 20,
        "min_tokens": 3,
        "temperature": 0.5,
        "top_k": 7,
        "top_p": 0.9,
        "min_p": 0.1,
        "repetition_penalty": 1.1,
        "presence_penalty": 0.2,
        "frequency_penalty": 0.3,
        "logit_bias": {"5": 2.5, "99": -100},
        "seed": -7,
        "stop": ["a", "b"],
        "stop_token_ids": [1, 99],
        "include_stop_str_in_output": True,
        "skip_special_tokens": False,
        "ignore_eos": True,
        "allowed_token_ids": [9, 5, 5],
        "bad_words": ["no"],
        "logprobs": 3,
        "echo": True,
        "n": 2,
    }
    sampling = sampling_of(completion(**said), FACTS, 4)
    changed = {
        "logit_bias": {5: 2.5, 99: -100.0},
        "stop": ("a", "b"),
        "stop_token_ids": (1, 99),
        "allowed_token_ids": (5, 9),
        "bad_words": ("no",),
        "prompt_logprobs": 3,
    }
    expected = {**said, **changed}
    expected.pop("echo")
    assert sampling == Sampling(**expected)
    assert set(expected) == {*Sampling.__struct_fields__} - {"bad_words_token_ids", "grammar"}


@pytest.mark.parametrize(
    ("request_", "logprobs", "prompt_logprobs"),
    [
        (completion(), None, None),
        (completion(logprobs=0), 0, None),
        (completion(logprobs=5), 5, None),
        (completion(logprobs=1, echo=True), 1, 1),
        (completion(echo=True), None, None),
        (completion(prompt_logprobs=2), None, 2),
        (completion(logprobs=1, echo=True, prompt_logprobs=0), 1, 1),
        (completion(logprobs=1, echo=True, prompt_logprobs=20), 1, 20),
        (chat(prompt_logprobs=0), None, 0),
        (chat(), None, None),
        (chat(logprobs=True), 0, None),
        (chat(logprobs=True, top_logprobs=20), 20, None),
        (chat(logprobs=False, top_logprobs=0), None, None),
    ],
)
def test_log_probabilities(request_: Any, logprobs: int | None, prompt_logprobs: Any) -> None:
    sampling = sampling_of(request_, FACTS, 4)
    assert (sampling.logprobs, sampling.prompt_logprobs) == (logprobs, prompt_logprobs)


@pytest.mark.parametrize("top_k", [-1, 0])
def test_both_ways_to_say_all_tokens(top_k: int) -> None:
    assert sampling_of(chat(top_k=top_k), FACTS, 4).top_k == 0


@pytest.mark.parametrize(
    ("make", "num_prompt", "max_tokens"),
    [
        (completion, 48, 16),
        (completion, 60, 4),
        (completion, 63, 1),
        (chat, 1, 63),
        (chat, 63, 1),
        (lambda: completion(max_tokens=60), 4, 60),
        (lambda: chat(max_completion_tokens=60), 4, 60),
    ],
)
def test_an_answer_fits_the_context(make: Any, num_prompt: int, max_tokens: int) -> None:
    assert sampling_of(make(), FACTS, num_prompt).max_tokens == max_tokens


def test_the_default_stays_within_what_an_engine_takes() -> None:
    sampling = sampling_of(chat(), ModelBounds(100, 10_000_000), 4)
    assert sampling.max_tokens == 1 << 20


@pytest.mark.parametrize(
    ("request_", "num_prompt", "says"),
    [
        (completion(), 0, "prompt: has 0 tokens"),
        (chat(), 0, "messages: has 0 tokens"),
        (completion(), 64, "prompt: has 64 tokens; this model's maximum context length is 64"),
        (completion(), 65, "prompt: has 65 tokens; this model's maximum context length is 64"),
        (chat(max_tokens=61), 4, "messages: has 4 tokens and max_tokens is 61; this model's"),
        (
            completion(max_tokens=1 << 20),
            1,
            "max_tokens is 1048576; this model's maximum context length is 64",
        ),
        (completion(min_tokens=17), 4, "min_tokens: is 17, more than max_tokens (16)"),
        (completion(min_tokens=9, max_tokens=8), 4, "is 9, more than max_tokens (8)"),
        (completion(stop_token_ids=[5, 100]), 4, "stop_token_ids: has token 100; the model knows"),
        (
            completion(logit_bias={"100": 1}),
            4,
            "logit_bias: has token 100; the model knows 0 ... 99",
        ),
        (completion(logit_bias={"9999999999": 1}), 4, "logit_bias: has token 9999999999"),
    ],
)
def test_what_the_model_cannot_do_is_refused_with_numbers(
    request_: Any, num_prompt: int, says: str
) -> None:
    error = refusal(request_, num_prompt)
    assert says in error.message
    assert error.message.startswith(f"{error.param}: ")


def test_a_long_prompt_has_the_code_that_clients_look_for() -> None:
    assert refusal(chat(), 64).code == "context_length_exceeded"


@pytest.mark.parametrize("wrong", [-1, 100, 2**63])
def test_ids_that_the_model_does_not_know_are_refused(wrong: int) -> None:
    check_ids("tokens", [0, 99], FACTS)
    check_ids("tokens", [], FACTS)
    with pytest.raises(ApiError, match=f"tokens: has token {wrong}; the model knows 0 ... 99"):
        check_ids("tokens", [0, wrong], FACTS)


@pytest.mark.parametrize(
    ("fields", "kept"),
    [
        ({}, range(80)),
        ({"truncate_prompt_tokens": 3}, (77, 78, 79)),
        ({"truncate_prompt_tokens": 3, "truncation_side": "right"}, (0, 1, 2)),
        ({"truncate_prompt_tokens": 100}, range(80)),
        ({"truncate_prompt_tokens": -1}, range(17, 80)),
        ({"truncate_prompt_tokens": -1, "max_tokens": 60}, (76, 77, 78, 79)),
        ({"truncate_prompt_tokens": -1, "max_tokens": 1000}, (79,)),
    ],
)
def test_prompts_are_cut(fields: dict[str, Any], kept: Any) -> None:
    assert kept_ids(chat(**fields), tuple(range(80)), FACTS) == tuple(kept)


@given(st.integers(0, 80), st.none() | st.integers(1, 80), st.integers(0, 80))
def test_an_answer_never_outgrows_the_context(
    num_prompt: int, asked: int | None, min_tokens: int
) -> None:
    request = completion(max_tokens=asked, min_tokens=min_tokens)
    with suppress(ApiError):
        sampling = sampling_of(request, FACTS, num_prompt)
        assert 1 <= sampling.max_tokens <= FACTS.max_model_len - num_prompt
        assert sampling.min_tokens <= sampling.max_tokens
