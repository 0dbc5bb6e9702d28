"""Matchers: masks are a function of the output alone, and follow the grammar to its end."""

import json
import random
import re
from collections.abc import Sequence

import numpy as np
import pytest
from grammar_walks import RandomModel, allowed, eos_of, json_compiler, json_tokenizer
from llguidance import LLParserLimits

from sagellm.backends.step import MatcherError
from sagellm.runtime.grammars import GrammarError, choice_grammar, compiled_grammar
from sagellm.runtime.grammars.grammar_compiler import GrammarCompiler
from sagellm.runtime.grammars.matcher import GrammarMatcher
from sagellm.runtime.sampling import Grammar

TOKENS = json_tokenizer()
EOS = eos_of(TOKENS)
WORD = Grammar(kind="regex", text="[a-c]{2,5}x?")
SCHEMA = Grammar(
    kind="json_schema",
    text=json.dumps(
        {
            "type": "object",
            "properties": {"name": {"type": "string"}, "size": {"type": "integer"}},
            "required": ["name"],
        }
    ),
)


def matcher_of(grammar: Grammar, *, ignores_eos: bool = False) -> GrammarMatcher:
    return json_compiler().compile(grammar, "", ignores_eos=ignores_eos)


def ids(text: str) -> list[int]:
    return list(TOKENS.encode(text))


def spelled(token_ids: Sequence[int]) -> set[str]:
    return {TOKENS.token_bytes(int(one)).decode(errors="replace") for one in token_ids}


def test_the_mask_has_the_tokens_that_continue_the_text() -> None:
    assert spelled(allowed(matcher_of(choice_grammar(["yes", "no"])), [])) <= {
        *("y", "ye", "yes", "n", "no")
    }
    assert spelled(allowed(matcher_of(choice_grammar(["yes", "no"])), ids("y"))) == {"e", "es"}


def test_the_end_is_allowed_where_the_grammar_may_end() -> None:
    matcher = matcher_of(WORD)
    assert EOS not in allowed(matcher, ids("a"))
    assert EOS in allowed(matcher, ids("ab"))
    assert spelled(allowed(matcher, ids("abcab"))) == {"x", "<|eos|>"}


def test_a_finished_text_allows_the_end_alone() -> None:
    assert allowed(matcher_of(WORD), ids("abx")).tolist() == [EOS]


def test_a_text_may_end_where_it_is_complete() -> None:
    matcher = matcher_of(WORD, ignores_eos=True)
    assert [matcher.may_end(ids(text)) for text in ("", "a", "ab", "abx", "abxa", "ab")] == [
        *(False, False, True, True, False, True)
    ]


def test_every_end_token_is_allowed_there() -> None:
    ends = frozenset([EOS, TOKENS.encode("z")[0]])
    compiler = GrammarCompiler(TOKENS, TOKENS.vocab_size, ends)
    matcher = compiler.compile(WORD, "", ignores_eos=False)
    assert allowed(matcher, ids("abx")).tolist() == sorted(ends)


def test_without_an_end_a_finished_text_allows_nothing() -> None:
    matcher = matcher_of(WORD, ignores_eos=True)
    assert allowed(matcher, ids("abx")).tolist() == []
    assert EOS not in allowed(matcher, ids("ab"))
    assert spelled(allowed(matcher, ids("ab"))) >= {"a", "x"}


@pytest.mark.parametrize("text", ["q", "abq", "abxa"])
def test_a_text_that_left_the_grammar_allows_every_token(text: str) -> None:
    matcher = matcher_of(WORD)
    assert len(allowed(matcher, ids(text))) == matcher.vocab_size
    assert allowed(matcher, ids("abx")).tolist() == [EOS]


def test_an_end_token_in_the_text_leaves_the_grammar() -> None:
    matcher = matcher_of(WORD)
    for output in ([EOS], [*ids("abx"), EOS], [*ids("ab"), EOS, *ids("x")]):
        assert len(allowed(matcher, output)) == matcher.vocab_size


def test_a_mask_has_zeros_after_the_vocabulary() -> None:
    matcher = matcher_of(WORD)
    mask = np.full(-(-matcher.vocab_size // 32), -1, np.int32)
    for output in ([], ids("q")):
        matcher.fill(output, mask)
        bits = np.unpackbits(mask.view(np.uint8), bitorder="little")
        assert not bits[matcher.vocab_size :].any()


@pytest.mark.parametrize("num_spare", [0, 1, 20, 32])
def test_padding_is_never_allowed(num_spare: int) -> None:
    size = -(-TOKENS.vocab_size // 32) * 32 + num_spare  # with and without a word of its own
    compiler = GrammarCompiler(TOKENS, size, frozenset([EOS]))
    matcher = compiler.compile(Grammar(kind="regex", text=r"(?s:.*)"), "", ignores_eos=False)
    assert allowed(matcher, []).max() == EOS


def test_special_tokens_are_allowed_only_where_they_are_named() -> None:
    (call,) = TOKENS.special_token_ids - {EOS}
    anything = matcher_of(Grammar(kind="regex", text=r"(?s:.*)"))
    assert call not in allowed(anything, [])
    assert len(allowed(anything, ids("<|call|>"))) == anything.vocab_size
    for name in ("<|call|>", f"<[{call}]>"):
        matcher = matcher_of(Grammar(kind="lark", text=f'start: {name} "x"'))
        assert allowed(matcher, []).tolist() == [call]
        assert spelled(allowed(matcher, [call])) == {"x"}


def test_added_tokens_that_are_not_special_are_text() -> None:
    matcher = matcher_of(choice_grammar(["<tool>"]))
    (tool,) = ids("<tool>")
    assert tool in allowed(matcher, [])
    assert allowed(matcher, [tool]).tolist() == [EOS]


def test_the_grammar_may_name_an_end_token() -> None:
    matcher = matcher_of(Grammar(kind="lark", text='start: "a" <|eos|> "b"'))
    assert allowed(matcher, ids("a")).tolist() == [EOS]
    assert spelled(allowed(matcher, [*ids("a"), EOS])) == {"b"}


def test_a_walk_and_a_fresh_matcher_agree() -> None:
    rng = random.Random(0)
    walker = matcher_of(SCHEMA)
    output: list[int] = []
    for token in RandomModel(TOKENS, np.random.default_rng(0)).tokens(walker, output):
        expected = allowed(walker, output).tolist()
        assert allowed(matcher_of(SCHEMA), output).tolist() == expected
        wrong = [*output, token, *(rng.randrange(TOKENS.vocab_size) for _ in range(3))]
        allowed(walker, wrong)  # drafts: the matcher takes them back
        allowed(walker, output[: rng.randint(0, len(output))])
        assert allowed(walker, output).tolist() == expected
        if token == EOS or len(output) > 80:
            break
        output.append(token)
    assert len(output) > 10


@pytest.mark.parametrize("regex", [r"[a-z]{3}-[0-9]+", r"(yes|no)( or (yes|no))*", r"[^a-z]{3,9}"])
def test_random_walks_match_the_expression(regex: str) -> None:
    model = RandomModel(TOKENS, np.random.default_rng(1))
    for _ in range(20):
        output, is_finished = model.answer(matcher_of(Grammar(kind="regex", text=regex)), 200)
        assert is_finished
        assert re.fullmatch(regex, TOKENS.decode(output))


def test_a_dead_end_allows_nothing_and_is_left_again() -> None:
    tokenizer = json_tokenizer()
    compiler = GrammarCompiler(NoZ(tokenizer), tokenizer.vocab_size, frozenset([eos_of(tokenizer)]))
    matcher = compiler.compile(choice_grammar(["az", "ab"]), "", ignores_eos=False)
    only = compiler.compile(Grammar(kind="regex", text="a(z|b)?z"), "", ignores_eos=False)
    (a,), (b,) = tokenizer.encode("a"), tokenizer.encode("b")
    assert allowed(matcher, [a]).tolist() == [b]
    for _ in range(2):
        assert allowed(only, [a, b]).tolist() == []
        assert not only.may_end([a, b])
    assert len(allowed(only, [a, b, a])) == only.vocab_size
    assert allowed(only, [a, b]).tolist() == []
    assert allowed(only, [a]).tolist() == [b]


class NoZ:
    """A tokenizer without the letter z."""

    def __init__(self, tokenizer: object) -> None:
        self._tokenizer = tokenizer

    def __getattr__(self, name: str) -> object:
        return getattr(self._tokenizer, name)

    def token_bytes(self, token_id: int) -> bytes:
        found = self._tokenizer.token_bytes(token_id)  # type: ignore[attr-defined]
        return b"" if b"z" in found else found


# Its lexer has other states for every text.
GREEDY = Grammar(kind="regex", text="((.{0,100}a){0,100}b){0,100}")
IMPATIENT = 10**6


def limit_states(monkeypatch: pytest.MonkeyPatch, num_states: int) -> None:
    limits = LLParserLimits(max_lexer_states=num_states, verbose_errors=False)
    monkeypatch.setattr(compiled_grammar, "LIMITS", limits)


def test_an_answer_that_needs_more_states_than_there_are_ends_with_a_reason(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    limit_states(monkeypatch, 1000)
    compiler = GrammarCompiler(TOKENS, TOKENS.vocab_size, frozenset([EOS]))
    model = RandomModel(TOKENS, np.random.default_rng(0), patience=IMPATIENT)
    with pytest.raises(MatcherError, match="too complex"):
        model.answer(compiler.compile(GREEDY, "", ignores_eos=False), 2000)
    # The next answer gets a lexer of its own.
    assert allowed(compiler.compile(GREEDY, "", ignores_eos=False), []).size


def test_answers_that_need_more_states_together_get_another_lexer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(compiled_grammar, "_MIN_FILLS", 10)
    limit_states(monkeypatch, 5000)
    compiler = GrammarCompiler(TOKENS, TOKENS.vocab_size, frozenset([EOS]))
    answers = [compiler.compile(GREEDY, "", ignores_eos=False) for _ in range(12)]
    for seed, matcher in enumerate(answers):
        model = RandomModel(TOKENS, np.random.default_rng(seed), patience=IMPATIENT)
        output, _ = model.answer(matcher, 15)
        assert allowed(answers[0], output).tolist() == allowed(matcher, output).tolist()
    assert compiler.num_kept == 1


def test_masks_that_take_too_long_end_the_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled_grammar, "_SPARE_S", 0.01)
    grammar = Grammar(kind="lark", text='start: start start start | start start | /./ | ""')
    matcher = json_compiler().compile(grammar, "slow", ignores_eos=False)
    model = RandomModel(TOKENS, np.random.default_rng(0), patience=IMPATIENT)
    with pytest.raises(MatcherError, match="too long"):
        model.answer(matcher, 500)


def test_a_resumed_answer_may_take_the_time_of_its_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled_grammar, "_SPARE_S", 0.0)
    monkeypatch.setattr(compiled_grammar, "_MEAN_FILL_S", 0.001)
    grammar = compiled_grammar.CompiledGrammar  # only `account` is called
    counted = grammar.__new__(grammar)
    counted._num_fills, counted._slow_s = 0, 0.0
    counted.account(0.9, 1000)
    with pytest.raises(MatcherError, match="too long"):
        counted.account(0.9, 1)


def test_a_grammar_that_cannot_be_renewed_ends_the_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled_grammar, "_MIN_FILLS", 0)
    compiler = GrammarCompiler(TOKENS, TOKENS.vocab_size, frozenset([EOS]))
    matcher = compiler.compile(WORD, "", ignores_eos=False)

    def refused(self: object) -> None:
        raise GrammarError("too large")

    monkeypatch.setattr(compiled_grammar.CompiledGrammar, "_compile", refused)
    with pytest.raises(MatcherError, match="too large"):
        matcher._restart()
