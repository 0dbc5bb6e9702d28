"""Sampling parameters of a wrong type are named in the error."""

from typing import Any

import pytest

from sagellm.runtime.sampling import Grammar, Sampling, sampling_fault


@pytest.mark.parametrize(
    ("name", "value", "wanted"),
    [
        ("bad_words", "damn", "a tuple of strings"),
        ("bad_words_token_ids", 5, "a tuple of tuples of token ids"),
        ("allowed_token_ids", 5, "a tuple of token ids"),
        ("allowed_token_ids", {1: 2}, "a tuple of token ids"),
        ("ignore_eos", "no", "True or False"),
        ("skip_special_tokens", 1, "True or False"),
        ("include_stop_str_in_output", None, "True or False"),
    ],
)
def test_a_value_of_a_wrong_type_is_refused_where_it_is_given(
    name: str, value: Any, wanted: str
) -> None:
    with pytest.raises(TypeError) as caught:
        Sampling(**{name: value})
    assert str(caught.value) == f"{name} is {value!r}; it must be {wanted}"


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("logit_bias", {"a": 1.0}, "logit_bias has something that is no token id"),
        ("logit_bias", {1: "b"}, "logit_bias has something that is no number"),
        ("logit_bias", {1: True}, "logit_bias has something that is no number"),
        ("allowed_token_ids", (1, "a"), "allowed_token_ids has something that is no token id"),
        ("allowed_token_ids", (1, [2]), "allowed_token_ids has something that is no token id"),
        ("stop_token_ids", (None,), "stop_token_ids has something that is no token id"),
        ("bad_words_token_ids", (1,), "bad_words_token_ids has something that is no sequence"),
        ("bad_words_token_ids", ((True,),), "bad_words_token_ids has something that is no token"),
    ],
)
def test_a_part_of_a_wrong_type_is_a_fault(name: str, value: Any, says: str) -> None:
    fault = sampling_fault(Sampling(**{name: value}))
    assert fault is not None
    assert fault.startswith(says)


def test_lists_do_as_tuples_do() -> None:
    sampling = Sampling(
        bad_words=["a"], bad_words_token_ids=[[1, 2]], allowed_token_ids=[3], stop_token_ids=[4]
    )
    assert sampling_fault(sampling) is None


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"kind": "xml", "text": "a"}, "kind is 'xml'"),
        ({"kind": ["regex"], "text": "a"}, "kind is"),
        ({"kind": "regex", "text": b"a"}, "text must be a string"),
    ],
)
def test_a_grammar_of_a_wrong_type_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        Grammar(**fields)
