"""The compiler of an engine: compiled grammars are kept, within bounds, for one tenant each."""

import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from grammar_walks import allowed, json_tokenizer

from sagellm.runtime.grammars import (
    GrammarError,
    choice_grammar,
    compiled_grammar,
    grammar_compiler,
)
from sagellm.runtime.grammars.compiled_grammar import CompiledGrammar, open_vocabulary
from sagellm.runtime.grammars.grammar_compiler import MAX_KEPT, GrammarCompiler
from sagellm.runtime.sampling import Grammar

TOKENS = json_tokenizer()
WORD = Grammar(kind="regex", text="[a-c]{2,5}")


@pytest.fixture
def fresh() -> GrammarCompiler:
    return GrammarCompiler(TOKENS, TOKENS.vocab_size, frozenset([TOKENS.vocab_size - 1]))


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The texts that are compiled."""
    texts: list[str] = []
    original = CompiledGrammar._compile

    def counted(self: CompiledGrammar) -> object:
        texts.append(self._source.text)
        return original(self)

    monkeypatch.setattr(CompiledGrammar, "_compile", counted)
    return texts


def test_a_grammar_is_compiled_once_for_a_tenant(
    fresh: GrammarCompiler, compiled: list[str]
) -> None:
    for ignores_eos in (False, True):
        fresh.compile(WORD, "a", ignores_eos=ignores_eos)
    assert len(compiled) == 1
    fresh.compile(WORD, "b", ignores_eos=False)
    fresh.compile(choice_grammar(["x"]), "a", ignores_eos=False)
    assert len(compiled) == 3


def test_matchers_of_one_grammar_do_not_disturb_each_other(fresh: GrammarCompiler) -> None:
    one, other = (fresh.compile(WORD, "", ignores_eos=False) for _ in range(2))
    expected = allowed(other, []).tolist()
    allowed(one, TOKENS.encode("abc"))
    assert allowed(other, []).tolist() == expected


def test_the_number_of_kept_grammars_is_bounded(
    fresh: GrammarCompiler, compiled: list[str]
) -> None:
    for number in range(MAX_KEPT + 5):
        fresh.compile(choice_grammar([str(number)]), "", ignores_eos=False)
        fresh.compile(choice_grammar(["0"]), "", ignores_eos=False)
    assert fresh.num_kept == MAX_KEPT
    assert len(compiled) == MAX_KEPT + 5  # the one that was used all the time stayed


def test_the_bytes_of_kept_grammars_are_bounded(
    fresh: GrammarCompiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grammar_compiler, "MAX_KEPT_BYTES", 1000)
    for number in range(10):
        fresh.compile(choice_grammar([f"{number}" * 300]), "", ignores_eos=False)
    assert fresh.num_kept == 3


@pytest.mark.parametrize(("limit", "most"), [("MAX_KEPT", 8), ("MAX_KEPT_BYTES", 30)])
def test_a_tenant_loses_only_its_own_share(
    fresh: GrammarCompiler,
    compiled: list[str],
    monkeypatch: pytest.MonkeyPatch,
    limit: str,
    most: int,
) -> None:
    monkeypatch.setattr(grammar_compiler, limit, most)
    fresh.compile(WORD, "s", user_id="few", ignores_eos=False)
    for number in range(20):  # salts of its own make no tenant
        fresh.compile(choice_grammar([str(number)]), f"{number}", user_id="many", ignores_eos=False)
    num_compiled = len(compiled)
    fresh.compile(WORD, "s", user_id="few", ignores_eos=False)
    assert len(compiled) == num_compiled
    assert fresh.num_kept <= 8


def test_a_refused_grammar_is_not_kept(fresh: GrammarCompiler) -> None:
    for _ in range(2):
        with pytest.raises(GrammarError):
            fresh.compile(Grammar(kind="regex", text="("), "", ignores_eos=False)
    assert fresh.num_kept == 0


def test_threads_compile_a_grammar_once(fresh: GrammarCompiler, compiled: list[str]) -> None:
    with ThreadPoolExecutor(8) as threads:
        made = list(threads.map(lambda _: fresh.compile(WORD, "", ignores_eos=False), range(16)))
    assert len(compiled) == 1
    assert len({tuple(allowed(matcher, [])) for matcher in made}) == 1


def test_every_thread_learns_of_the_fault(
    fresh: GrammarCompiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun = threading.Event()

    def refused(self: CompiledGrammar) -> None:
        begun.wait(5)
        raise GrammarError("no")

    monkeypatch.setattr(CompiledGrammar, "_compile", refused)
    with ThreadPoolExecutor(4) as threads:
        waiting = [threads.submit(fresh.compile, WORD, "", ignores_eos=False) for _ in range(4)]
        begun.set()
    assert all(isinstance(each.exception(), GrammarError) for each in waiting)


def test_the_first_grammar_opens_the_vocabulary_that_all_share(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    opened: list[int] = []

    def counted(*arguments: object) -> object:
        opened.append(1)
        return open_vocabulary(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(grammar_compiler, "open_vocabulary", counted)
    fresh = GrammarCompiler(TOKENS, TOKENS.vocab_size, frozenset())
    assert opened == []
    for number in range(3):
        fresh.compile(choice_grammar([str(number)]), "", ignores_eos=False)
    assert len(opened) == 1


def test_a_vocabulary_without_bytes_refuses_every_grammar(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*arguments: object) -> None:
        raise GrammarError("no bytes")

    monkeypatch.setattr(grammar_compiler, "open_vocabulary", refused)
    compiler = GrammarCompiler(TOKENS, TOKENS.vocab_size, frozenset())
    for _ in range(2):
        with pytest.raises(GrammarError, match="no bytes"):
            compiler.compile(WORD, "", ignores_eos=False)


def test_a_grammar_that_reached_its_limits_is_compiled_anew(
    fresh: GrammarCompiler, compiled: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiled_grammar, "_SPARE_S", -1.0)
    matcher = fresh.compile(WORD, "", ignores_eos=False)
    with pytest.raises(compiled_grammar.MatcherError):
        allowed(matcher, [])
    monkeypatch.undo()
    assert allowed(fresh.compile(WORD, "", ignores_eos=False), []).size


@pytest.mark.parametrize("library", ["torch", "numpy"])
def test_a_gateway_checks_grammars_without(library: str) -> None:
    program = (
        f"import sys; sys.modules[{library!r}] = None; "  # an import raises ImportError
        "from sagellm.runtime.grammars.grammar_compiler import check_grammar; "
        "from sagellm.runtime.grammars import json_object_grammar; "
        "check_grammar(json_object_grammar())"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
