import contextlib
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sagellm.batch.prompt_lines import MAX_LINE_BYTES, LineError, LineRequest, parse_line
from sagellm.runtime.messages import PRIORITIES
from sagellm.runtime.sampling import Sampling

DEFAULTS = Sampling(max_tokens=9)


def ask(chosen: frozenset[str] = frozenset(), **line: Any) -> LineRequest:
    return parse_line(7, json.dumps(line).encode(), DEFAULTS, chosen)


def body(**fields: Any) -> dict[str, Any]:
    return {"custom_id": "c", "body": fields}


def test_a_prompt_alone_takes_the_defaults_and_its_line_number() -> None:
    assert ask(prompt="hi") == LineRequest(id=7, number=7, prompt="hi", sampling=DEFAULTS)


def test_a_line_overrides_the_defaults() -> None:
    found = ask(id="x", prompt="hi", max_tokens=3, temperature=0.5, stop="end", logprobs=2, n=2)
    said = Sampling(max_tokens=3, temperature=0.5, stop=("end",), logprobs=2, n=2)
    assert (found.id, found.sampling) == ("x", said)


def test_null_means_unsaid() -> None:
    assert ask(prompt="hi", seed=None, stop=None, logit_bias=None).sampling == DEFAULTS


def test_logit_bias_has_token_ids_for_keys() -> None:
    assert ask(prompt="hi", logit_bias={"12": -1.5}).sampling.logit_bias == {12: -1.5}


def test_a_prompt_may_be_token_ids() -> None:
    assert ask(prompt=[1, 2, 3]).prompt == [1, 2, 3]


def test_messages_keep_role_and_text_parts() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert ask(messages=[{"role": "user", "content": parts}]).prompt == [
        {"role": "user", "content": "ab"}
    ]


@pytest.mark.parametrize(("priority", "number"), [("high", PRIORITIES["high"]), (4, 4)])
def test_priority_is_a_name_or_a_number(priority: str | int, number: int) -> None:
    assert ask(prompt="hi", priority=priority).fields == {"priority": number}


def test_a_line_may_keep_its_place() -> None:
    found = ask(prompt="hi", priority="background", can_be_preempted=False)
    assert found.fields == {"priority": PRIORITIES["background"], "can_be_preempted": False}


def test_fields_of_the_request_are_kept_apart_from_sampling() -> None:
    found = ask(prompt="hi", user_id="u", slo_ttft_s=0.5)
    assert found.fields == {"user_id": "u", "slo_ttft_s": 0.5}


def test_an_openai_line_has_the_temperature_of_openai() -> None:
    found = ask(**body(model="gpt", prompt="hi"))
    assert (found.id, found.sampling.temperature, found.sampling.max_tokens) == ("c", 1.0, 9)


def test_a_temperature_that_the_user_chose_goes_before_that_of_openai() -> None:
    assert ask(frozenset({"temperature"}), **body(prompt="hi")).sampling.temperature == 0.0
    assert ask(frozenset({"temperature"}), **body(prompt="hi", temperature=2)).sampling == (
        Sampling(max_tokens=9, temperature=2.0)
    )


def test_max_completion_tokens_is_the_newer_name() -> None:
    found = ask(**body(prompt="hi", max_tokens=2, max_completion_tokens=5))
    assert found.sampling.max_tokens == 5


@pytest.mark.parametrize(
    ("said", "num"),
    [
        ({"logprobs": True, "top_logprobs": 3}, 3),
        ({"logprobs": True}, 0),
        ({"logprobs": 4}, 4),
        ({"logprobs": False, "top_logprobs": None}, None),
        ({"logprobs": 0}, 0),
        ({}, None),
    ],
)
def test_logprobs_of_chat_and_of_completions(said: dict[str, Any], num: int | None) -> None:
    assert ask(**body(prompt="hi", **said)).sampling.logprobs == num


@pytest.mark.parametrize("said", [{}, {"logprobs": False}, {"logprobs": None}, {"logprobs": 2}])
def test_top_logprobs_alone_are_refused(said: dict[str, Any]) -> None:
    with pytest.raises(LineError, match="`top_logprobs` needs `logprobs`: true"):
        ask(**body(prompt="hi", top_logprobs=3, **said))


def test_the_model_of_openai_goes_with_the_request() -> None:
    assert ask(**body(prompt="hi", model="m")).fields == {"model": "m"}


def test_the_user_of_openai_is_our_user_id() -> None:
    assert ask(**body(prompt="hi", user="u")).fields == {"user_id": "u"}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"{", "line 7: Input data was truncated"),
        (b" " * (MAX_LINE_BYTES + 1), "line 7: longer than 64 MiB"),
        (b"[1]", "line 7: expected an object"),
        (b"\xff", "line 7: "),
        (b"[" * 100_000, "line 7: "),
        (b'{"promt": "hi"}', "unknown field `promt`; did you mean `prompt`?"),
        (b'{"prompt": "hi", "zzzz": 1}', "unknown field `zzzz`; known are prompt,"),
        (b'{"custom_id": "c", "body": {"mesages": []}}', "`body.mesages`; did you mean `messages`"),
        (b'{"prompt": "hi", "max_tokens": "3"}', "Expected `int"),
        (b'{"prompt": ""}', "`prompt` is empty"),
        (b"{}", "give either `prompt` or `messages`"),
        (b'{"prompt": "a", "messages": [{"role": "user", "content": "b"}]}', "give either"),
        (
            b'{"prompt": "hi", "priority": "urgent"}',
            "unknown priority `urgent`; known",
        ),
        (b'{"custom_id": "c"}', "missing required field `body`"),
        (b'{"custom_id": "c", "body": {"prompt": "a", "stream": true}}', "Invalid enum value True"),
        (
            b'{"custom_id": "c", "url": "/v1/chat/completions", "body": {"prompt": "a"}}',
            "a body for /v1/completions under the url /v1/chat/completions",
        ),
    ],
)
def test_a_wrong_line_says_its_number_and_what_is_wrong(line: bytes, message: str) -> None:
    with pytest.raises(LineError) as caught:
        parse_line(7, line, DEFAULTS)
    assert str(caught.value).startswith("line 7: ")
    assert message in str(caught.value)


def test_a_wrong_line_keeps_its_own_id() -> None:
    with pytest.raises(LineError) as caught:
        ask(id="mine", prompt="")
    assert caught.value.id == "mine"


def test_a_line_without_an_id_is_named_by_its_number() -> None:
    with pytest.raises(LineError) as caught:
        ask(prompt="")
    assert caught.value.id == 7


VALUES = st.none() | st.booleans() | st.integers() | st.text(max_size=5) | st.lists(st.integers())
NAMES = st.sampled_from(["id", "custom_id", "body", "prompt", "messages", "n", "stop", "seed"])
LINES = st.dictionaries(NAMES, VALUES | st.dictionaries(NAMES, VALUES)).map(json.dumps)


@given(st.binary(max_size=40) | LINES.map(str.encode))
def test_any_bytes_are_an_ask_or_a_line_error(raw: bytes) -> None:
    with contextlib.suppress(LineError):
        assert isinstance(parse_line(1, raw, DEFAULTS), LineRequest)


@given(st.text(min_size=1), st.integers(1, 99))
def test_what_a_line_says_arrives(prompt: str, max_tokens: int) -> None:
    found = ask(prompt=prompt, max_tokens=max_tokens)
    assert (found.prompt, found.sampling.max_tokens) == (prompt, max_tokens)
