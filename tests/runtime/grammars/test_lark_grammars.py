"""Grammars in Lark, and in the ::= form of llama.cpp."""

import numpy as np
import pytest
from grammar_walks import RandomModel, allowed, eos_of, json_compiler, json_tokenizer

from sagellm.runtime.grammars import GrammarError
from sagellm.runtime.grammars.grammar_compiler import check_grammar
from sagellm.runtime.grammars.json_schemas import WHITESPACE
from sagellm.runtime.grammars.lark_grammars import lark_text, special_tokens
from sagellm.runtime.sampling import Grammar

TOKENS = json_tokenizer()
CALL = """
// A call of a tool, or text.
start: TEXT | call          # the first rule
TEXT: /[^<](.|\\n)*/
call: "<call>" %json {"type": "object", "properties": {"a/b": {"enum": ["\\"%json", "// x"]}}} tail
tail[capture="]"]: ("</call>" | [TEXT]) %regex {"substring_words": "a b c"}
"""
ARITHMETIC = """
# llama.cpp's example
root  ::= (expr "=" ws term "\\n")+
expr  ::= term ([-+*/] term)*
term  ::= ident | num | "(" ws expr ")" ws
ident ::= [a-z] [a-z0-9_]* ws
num   ::= [0-9]+ ws
ws    ::= [ \\t]*
"""


def lark(text: str) -> Grammar:
    return Grammar(kind="lark", text=text)


def takes(grammar: Grammar, text: str) -> bool:
    matcher = json_compiler().compile(grammar, "", ignores_eos=False)
    follows = allowed(matcher, TOKENS.encode(text))
    return eos_of(TOKENS) in follows and len(follows) < matcher.vocab_size


def test_the_text_stays_but_for_schemas() -> None:
    before, after = CALL.split("%json")[0], CALL.split("]}}}")[1]
    found = lark_text(CALL)
    assert found.startswith(f"{before}%json")
    assert found.endswith(after)
    assert WHITESPACE.replace("\\", "\\\\") in found


def test_schemas_in_a_grammar_have_our_options_unless_they_name_their_own() -> None:
    grammar = lark('start: %json {"type":"array"} "!"')
    assert takes(grammar, "[ ]!")
    assert not takes(grammar, "[   ]!")
    own = lark('start: %json {"type":"array","not":{},"x-guidance":{"lenient":true,'
               '"whitespace_pattern":"x"}} "!"')  # fmt: skip
    assert takes(own, "[x]!")
    assert not takes(own, "[ ]!")


@pytest.mark.parametrize("options", ["5", '{"whitespace_pattern":"%s"}' % (".?" * 2000)])
def test_options_of_a_schema_are_bounded(options: str) -> None:
    with pytest.raises(GrammarError, match=r"x-guidance|in a row"):
        check_grammar(lark(f'start: %json {{"x-guidance":{options}}}'))


def test_special_tokens_are_found_outside_of_texts() -> None:
    text = 'start: <|a|> "<|b|>" /<c>/ <d> <[5]> // <e>'
    assert special_tokens(text) == {"|a|", "d", "[5]"}


def test_a_grammar_with_special_tokens_is_checked_without_a_model() -> None:
    check_grammar(lark('start: <|any|> "x" | <[999999]>'))
    with pytest.raises(GrammarError, match="not defined"):
        check_grammar(lark("start: <|any|> b"))
    with pytest.raises(GrammarError, match="no special token of that name"):
        json_compiler().compile(lark("start: <|any|>"), "", ignores_eos=False)


def test_a_grammar_of_llama_cpp_is_taken() -> None:
    assert takes(lark(ARITHMETIC), "x +(12 +y)*3 =z\n")
    assert not takes(lark(ARITHMETIC), "x==z\n")


def test_recursive_rules_are_followed() -> None:
    grammar = lark('start: "(" start ")" | "x"')
    model = RandomModel(TOKENS, np.random.default_rng(0), patience=3)
    texts = set()
    for _ in range(20):
        output, _ = model.answer(json_compiler().compile(grammar, "", ignores_eos=False), 60)
        text = TOKENS.decode(output)
        texts.add(text)
        assert text.count("(") >= text.count(")")
        assert takes(grammar, text) is (text.count("(") == text.count(")") and "x" in text)
    assert len(texts) > 3


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "no rule named start"),
        ("start: b", r"not defined \(line 1, column 8\)"),
        ('begin: "b"', "no rule named start"),
        ('start: "a"\nstart: "b"', r"defined twice \(line 2"),
        ('start: A\nA: A "x"', "refers to itself"),
        ("start: %json 5", "not a JSON object"),
        ("start: %json {", "not valid JSON"),
        ("start: %json " + '{"a":' * 5000, "nested too deeply"),
        ('start: %json {"type":"foo"}', "a type that JSON does not have"),
        ("start: /(/", "not valid"),
        ('a[temperature=0.5]: "x"\nstart: a', "attribute temperature"),
        ("root ::= other", "::= rules is not valid"),
    ],
)
def test_a_faulty_grammar_is_refused(text: str, reason: str) -> None:
    with pytest.raises(GrammarError, match=reason):
        check_grammar(lark(text))
