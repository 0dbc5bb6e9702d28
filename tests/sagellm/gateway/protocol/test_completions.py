"""A completion's body: every field, range and size of the API, refused by name and number."""

import json
from typing import Any

import pytest

from sagellm.gateway.api_errors import ApiError
from sagellm.gateway.protocol.bodies import CompletionRequest, read_completion
from sagellm.gateway.settings import RequestLimits

LIMITS = RequestLimits()


def read(**fields: Any) -> CompletionRequest:
    return read_completion(json.dumps({"prompt": "hi", **fields}).encode(), LIMITS)


def refusal(**fields: Any) -> ApiError:
    with pytest.raises(ApiError) as caught:
        read(**fields)
    return caught.value


@pytest.mark.parametrize(
    ("prompt", "prompts"),
    [
        ("hi", ("hi",)),
        (["hi"], ("hi",)),
        (["a", "b"], ("a", "b")),
        ([1, 2, 3], ((1, 2, 3),)),
        ([[1, 2], [3]], ((1, 2), (3,))),
        (["x"] * 1024, ("x",) * 1024),
        ([0] * 5000, ((0,) * 5000,)),
    ],
)
def test_each_form_of_a_prompt_is_read(prompt: Any, prompts: Any) -> None:
    assert read(prompt=prompt).prompts == prompts


@pytest.mark.parametrize(
    ("prompt", "says"),
    [
        ("", "length >= 1"),
        ([], "length >= 1"),
        ([[]], "length >= 1"),
        ([""], "length >= 1"),
        ([[1], []], "length >= 1"),
        (None, "missing"),
        (5, "got `int`"),
        ({}, "got `object`"),
        ([1.5], "got `float`"),
        ([True], "got `bool`"),
        ([None], "got `null`"),
        ([-1], "is -1"),
        ([1 << 31], "is 2147483648"),
        ([[1, -7]], "is -7"),
        ([2**63], "is 9223372036854775808"),
        (["a", 1], "mixes"),
        ([1, [1]], "mixes"),
        (["x"] * 1025, "has 1025 prompts; the limit is 1024"),
        ([[1]] * 1025, "has 1025 prompts; the limit is 1024"),
    ],
)
def test_a_wrong_prompt_is_refused(prompt: Any, says: str) -> None:
    error = refusal(prompt=prompt)
    assert error.status == 400
    assert error.param is not None
    assert error.param.startswith("prompt")
    assert says in error.message


def test_a_million_lists_are_refused_before_they_are_built() -> None:
    body = b'{"prompt": [' + b"[1]," * 10**6 + b"[1]]}"
    with pytest.raises(ApiError, match="objects and arrays"):
        read_completion(body, LIMITS)


# Field, values that are served, values that are refused, and what a refusal says (else numbers).
ROWS: list[tuple[str, list[Any], list[Any]]] = [
    ("model", ["m", None], [1, ["m"]]),
    ("max_tokens", [1, 1 << 20, None], [0, -1, 10**12, 1.5, "1", True]),
    ("max_completion_tokens", [1, 7, None], [0, -1, 10**12, 1.5, True]),
    ("n", [1, 16, None], [0, 17, 10**9, -1, 1.5, True, "2"]),
    ("best_of", [1, None], [0, 2, 17, 10**9, -1, 1.5, True]),
    ("temperature", [0, 0.0, 1, 2.0, 100, None], [-1, -0.001, 101, True, "1"]),
    ("top_p", [1, 0.1, 1e-9, None], [0, 2, 1.001, -1, True]),
    ("top_k", [-1, 0, 40, None], [-2, -5, 2**32, 1.5, True]),
    ("min_p", [0, 0.5, 1, None], [-0.1, 1.1]),
    ("repetition_penalty", [1, 0.5, 2, None], [0, -1, 101]),
    ("presence_penalty", [-2, 0, 2, None], [-2.1, 99]),
    ("frequency_penalty", [-2, 0, 2, None], [2.1, 99]),
    ("seed", [0, -(2**63), 2**63 - 1, None], [2**63, 1.5, True, "1"]),
    ("min_tokens", [0, 8, None], [-1, 10**9, 1.5]),
    ("logprobs", [0, 20, None], [-1, 21, True, 1.5]),
    ("echo", [True, False, None], [1, "true"]),
    ("stream", [True, False, None], [1, "true"]),
    ("stop", ["a", ["a", "b"], [], ["x"] * 16, "x" * 1024, None], ["", ["a", ""], [1], 1]),
    ("stop_token_ids", [[], [0, 5], None], [[-1], [1 << 31], [2**63 - 1], [True], 5]),
    ("logit_bias", [{}, {"5": 100, "0": -100}, None], [{"5": 101}, {"5": "x"}, [5]]),
    (
        "logit_bias",
        [{str(token): 1 for token in range(1024)}],
        [{"a": 1}, {"-1": 1}, {"01": 1}, {"1\n": 1}],
    ),
    ("ignore_eos", [True, False, None], [1]),
    ("skip_special_tokens", [True, False, None], [0]),
    ("include_stop_str_in_output", [True, False, None], [0]),
    ("add_special_tokens", [True, False, None], ["no"]),
    ("return_token_ids", [True, False, None], ["no"]),
    ("truncate_prompt_tokens", [-1, 1, 5, None], [0, -2, 1 << 31, 1.5]),
    ("truncation_side", ["left", "right", None], ["middle", 1]),
    ("priority", [0, 4, None], [-1, 5, "high"]),
    ("request_id", ["a-B_9.x", None], ["", "a b", "a/b", "a\n", "x" * 129, 5]),
    ("cache_salt", ["x", "x" * 64, None], ["", "x" * 65, 5]),
    ("slo_ttft_s", [0.5, 86_400, None], [0, -1, 10**6]),
    ("timeout_s", [0.5, 60, None], [0, -1, 10**6]),
    ("no_queue", [True, False, None], [0, "yes"]),
    ("user", ["me", "x" * 512, None], ["x" * 513, 5]),
    ("safety_identifier", ["me", None], ["x" * 513, 5]),
    ("prompt_cache_key", ["me", None], ["x" * 513, 5]),
]


@pytest.mark.parametrize(
    ("field", "value"), [(field, value) for field, served, _ in ROWS for value in served]
)
def test_values_in_range_are_read(field: str, value: Any) -> None:
    found = getattr(read(**{field: value}), field)
    default = CompletionRequest.__struct_defaults__
    assert found == value if value is not None else found in (*default, {}, [])


@pytest.mark.parametrize(
    ("field", "value"), [(field, value) for field, _, wrong in ROWS for value in wrong]
)
def test_values_out_of_range_are_refused_by_name(field: str, value: Any) -> None:
    error = refusal(**{field: value})
    assert error.status == 400
    assert error.param is not None
    assert error.param.partition("[")[0] == field
    if isinstance(value, int | float) and not isinstance(value, bool):
        assert f"is {value}" in error.message or "got" in error.message


@pytest.mark.parametrize(
    ("field", "value", "says"),
    [
        ("n", 17, "is 17; the limit is 16"),
        ("logprobs", 21, "is 21; expected `int` <= 20"),
        ("stop", ["x"] * 17, "has 17 strings; the limit is 16"),
        ("stop", "x" * (1 << 20), "has 1048576 bytes in one string; the limit is 1024"),
        ("stop", ["é" * 600], "has 1200 bytes in one string; the limit is 1024"),
        ("logit_bias", dict.fromkeys(map(str, range(1025)), 1), "has 1025 entries; the limit is"),
        ("stop_token_ids", [1] * 1025, "of length <= 1024"),
        ("best_of", 3, "is 3; only the value of n (1)"),
    ],
)
def test_too_much_is_refused_with_both_numbers(field: str, value: Any, says: str) -> None:
    assert says in refusal(**{field: value}).message


def test_best_of_may_say_what_n_says() -> None:
    assert read(n=4, best_of=4).n == 4


def test_limits_are_the_operators() -> None:
    body = json.dumps({"prompt": ["a", "b"], "n": 2}).encode()
    assert read_completion(body, LIMITS).n == 2
    with pytest.raises(ApiError, match="n: is 2; the limit is 1"):
        read_completion(body, RequestLimits(num_choices=1))
    with pytest.raises(ApiError, match="has 2 prompts; the limit is 1"):
        read_completion(body, RequestLimits(num_prompts=1))


def test_both_spellings_of_max_tokens_may_agree() -> None:
    assert read(max_tokens=5, max_completion_tokens=5).asked_tokens == 5
    assert read(max_completion_tokens=6).asked_tokens == 6
    assert "is 5, but max_completion_tokens is 6" in (
        refusal(max_tokens=5, max_completion_tokens=6).message
    )


def test_stream_options_are_read() -> None:
    options = {"include_usage": True, "continuous_usage_stats": True, "include_obfuscation": False}
    request = read(stream=True, stream_options=options)
    assert request.has_usage
    assert request.has_continuous_usage
    assert not read(stream=True, stream_options={"include_usage": None}).has_usage
    assert not read().has_usage


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"stream_options": []}, "stream_options"),
        ({"stream": True, "stream_options": []}, "stream_options"),
        ({"stream": True, "stream_options": {"include_usage": 1}}, "stream_options.include_usage"),
        ({"stream": True, "stream_options": {"usage": True}}, "stream_options.usage"),
        (
            {"stream": True, "stream_options": {"include_obfuscation": True}},
            "stream_options.include_obfuscation",
        ),
    ],
)
def test_wrong_stream_options_are_refused(fields: dict[str, Any], param: str) -> None:
    assert refusal(**fields).param == param


@pytest.mark.parametrize("name", ["x" * 257, "../" * 4000])
def test_the_name_of_no_model_is_not_found(name: str) -> None:
    error = refusal(model=name)
    assert (error.status, error.code, error.param) == (404, "model_not_found", "model")
    assert name not in error.message


@pytest.mark.parametrize("body", [b"[]", b'"hi"', b"null", b"5", b"true"])
def test_a_body_is_an_object(body: bytes) -> None:
    with pytest.raises(ApiError, match="no JSON object"):
        read_completion(body, LIMITS)
