"""The compiler of an engine: grammars are checked, compiled and kept."""

import functools
import threading
from collections import Counter, OrderedDict
from concurrent.futures import Future
from typing import NamedTuple

from llguidance import LLMatcher, LLTokenizer

from sagellm.runtime.grammars import GrammarError
from sagellm.runtime.grammars.compiled_grammar import (
    LIMITS,
    CompiledGrammar,
    llguidance_text,
    open_vocabulary,
    vocabulary_of,
)
from sagellm.runtime.grammars.lark_grammars import special_tokens
from sagellm.runtime.grammars.matcher import GrammarMatcher
from sagellm.runtime.models.tokenizer import Tokenizer
from sagellm.runtime.sampling import Grammar

MAX_KEPT = 64  # compiled grammars of one engine: a lexer takes up to 30 MB
MAX_KEPT_BYTES = 4 << 20  # of their texts


class _Key(NamedTuple):
    """The identity of a kept grammar: whose it is, and what it is."""

    user_id: str
    salt: str
    grammar: Grammar

    @property
    def num_bytes(self) -> int:
        return len(self.salt) + len(self.grammar.text)


_BYTES = [bytes([value]) for value in range(256)]


def check_grammar(grammar: Grammar) -> None:
    """Raise GrammarError if a grammar cannot be used.

    Needs no tokenizer: a model may turn out to lack a special token that the grammar names. Blocks
    the thread for milliseconds, for the largest grammars tenths of a second, mostly without
    Python's lock.
    """
    source = llguidance_text(grammar)
    special = sorted(special_tokens(source.text)) if grammar.kind == "lark" else []
    if not any(name.startswith("[") for name in special):
        CompiledGrammar(_byte_vocabulary(*special), source)
    elif fault := LLMatcher.validate_grammar(source.text, limits=LIMITS):  # tokens by number
        raise source.fault(fault)


@functools.lru_cache(8)
def _byte_vocabulary(*special: str) -> LLTokenizer:
    """A token for each byte, and special tokens."""
    tokens = [*_BYTES, *(f"<{name}>".encode() for name in special)]
    return vocabulary_of(tokens, range(len(_BYTES), len(tokens)))


class GrammarCompiler:
    """Compiles grammars for one engine, and keeps those that were used last.

    `vocab_size`: the number of logits of the model. Any thread may call any method.
    """

    def __init__(
        self, tokenizer: Tokenizer, vocab_size: int, eos_token_ids: frozenset[int]
    ) -> None:
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._end_ids = frozenset(one for one in eos_token_ids if 0 <= one < vocab_size)
        self._opening = threading.Lock()
        self._vocabulary: LLTokenizer | None = None
        self._fault = ""  # why no grammar can be compiled for this vocabulary
        self._lock = threading.Lock()
        self._kept: OrderedDict[_Key, Future[CompiledGrammar]] = OrderedDict()
        self._num_bytes = 0

    @property
    def num_kept(self) -> int:
        return len(self._kept)

    def open(self) -> LLTokenizer:
        """Open the vocabulary at the first call; a call meanwhile waits. Returns the vocabulary.

        Blocks the thread for up to a second. Most of that time holds Python's lock, and so holds up
        sequences that run. Raises GrammarError if no grammar can follow the tokens of the model.
        """
        with self._opening:
            if self._vocabulary is None and not self._fault:
                try:
                    self._vocabulary = open_vocabulary(
                        self._tokenizer, self._vocab_size, self._end_ids
                    )
                except GrammarError as error:
                    self._fault = str(error)
        if self._vocabulary is None:
            raise GrammarError(self._fault)
        return self._vocabulary

    def compile(
        self, grammar: Grammar, salt: str, *, user_id: str = "", ignores_eos: bool
    ) -> GrammarMatcher:
        """A matcher of a grammar. Blocks the thread; the first call opens the vocabulary. Raises
        GrammarError.

        Only requests of one tenant (`user_id`) and one `salt` share a compiled grammar, because the
        time of a call would tell one what another uses. `ignores_eos`: the model's end tokens are
        never allowed; a finished answer then has an empty mask.
        """
        compiled = self._compiled(_Key(user_id, salt, grammar), self.open())
        end_ids = frozenset[int]() if ignores_eos else self._end_ids
        return GrammarMatcher(compiled, self._vocab_size, end_ids)

    def _compiled(self, key: _Key, vocabulary: LLTokenizer) -> CompiledGrammar:
        """The grammar of a key. The first caller compiles it, and the others wait."""
        with self._lock:
            found = self._kept.get(key)
            if found is not None and not _is_exhausted(found):
                self._kept.move_to_end(key)
                mine = None
            else:
                mine = self._keep(key)
        if mine is None:
            assert found is not None
            return found.result()
        try:
            mine.set_result(CompiledGrammar(vocabulary, llguidance_text(key.grammar)))
        except BaseException as error:
            self._forget(key, mine)
            mine.set_exception(error)
            raise
        return mine.result()

    def _keep(self, key: _Key) -> "Future[CompiledGrammar]":
        """Make room for a grammar. The caller holds the lock.

        The tenant that keeps the most loses the grammar that it has not used for the longest time.
        """
        if key not in self._kept:
            self._num_bytes += key.num_bytes
        mine = self._kept[key] = Future[CompiledGrammar]()
        self._kept.move_to_end(key)
        while len(self._kept) > MAX_KEPT or self._num_bytes > MAX_KEPT_BYTES:
            shares = Counter[str]()
            for kept in self._kept:
                shares[kept.user_id] += 1 if len(self._kept) > MAX_KEPT else kept.num_bytes
            largest = max(shares, key=shares.__getitem__)
            oldest = next(kept for kept in self._kept if kept.user_id == largest)
            del self._kept[oldest]
            self._num_bytes -= oldest.num_bytes
        return mine

    def _forget(self, key: _Key, failed: "Future[CompiledGrammar]") -> None:
        with self._lock:
            if self._kept.get(key) is failed:
                del self._kept[key]
                self._num_bytes -= key.num_bytes


def _is_exhausted(future: "Future[CompiledGrammar]") -> bool:
    return future.done() and future.exception() is None and future.result().is_exhausted
