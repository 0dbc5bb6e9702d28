"""Choices and JSON objects as grammars."""

import json

import jsonschema_rs
import numpy as np
import pytest
from grammar_walks import RandomModel, json_compiler, json_tokenizer

from sagellm.runtime.grammars import choice_grammar, json_object_grammar
from sagellm.runtime.grammars.grammar_compiler import check_grammar
from sagellm.runtime.sampling import Grammar

ODD = [
    "a|b",
    "(x",
    "[y]",
    "z*",
    "\\d",
    "new\nline",
    "größer",
    "日本",
    '"quoted"',
    "a/b",
    "",
    " x ",
    "#",
]


def answers(grammar: Grammar, number: int) -> set[str]:
    model = RandomModel(json_tokenizer(), np.random.default_rng(0))
    found = set()
    for _ in range(number):
        output, is_finished = model.answer(
            json_compiler().compile(grammar, "", ignores_eos=False), 300
        )
        assert is_finished
        found.add(json_tokenizer().decode(output))
    return found


def test_a_choice_is_one_of_its_texts_whatever_their_characters() -> None:
    assert answers(choice_grammar(ODD), 200) == set(ODD)


def test_a_choice_needs_a_text() -> None:
    with pytest.raises(ValueError, match="at least one"):
        choice_grammar([])


def test_thousands_of_choices_fit() -> None:
    check_grammar(choice_grammar([f"choice number {number}" for number in range(4000)]))


def test_an_object_may_be_any() -> None:
    for text in answers(json_object_grammar(), 10):
        jsonschema_rs.validate({"type": "object"}, json.loads(text))
