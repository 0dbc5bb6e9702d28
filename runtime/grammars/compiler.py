"""The compiler of an engine: grammars are checked, compiled and kept."""

import threading
from collections import OrderedDict
from concurrent.futures import Future

from llguidance import LLMatcher, LLTokenizer

from sagellm.runtime.grammars import GrammarError
from sagellm.runtime.grammars.llguidance_text import LIMITS, llguidance_text
from sagellm.runtime.grammars.matcher import GrammarMatcher
from sagellm.runtime.grammars.token_bytes import open_vocabulary
from sagellm.runtime.models.tokenizer import Tokenizer
from sagellm.runtime.sampling import Grammar

_MAX_KEPT, _MAX_KEPT_BYTES = 256, 4 << 20
_Key = tuple[str, Grammar]


def check_grammar(grammar: Grammar) -> None:
    """Raise GrammarError if a grammar cannot be used. Needs no tokenizer. Blocks the thread for
    milliseconds.
    """
    if fault := LLMatcher.validate_grammar(llguidance_text(grammar), limits=LIMITS):
        raise GrammarError(_reason(fault))


def _reason(fault: str) -> str:
    return "the grammar cannot be compiled"


class GrammarCompiler:
    """Compiles grammars for one engine, and keeps the latest.

    `vocab_size`: the number of logits of the model.
    """

    def __init__(
        self, tokenizer: Tokenizer, vocab_size: int, eos_token_ids: frozenset[int]
    ) -> None:
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._eos_token_ids = frozenset(one for one in eos_token_ids if 0 <= one < vocab_size)
        self._vocabulary: LLTokenizer | None = None
        self._vocabulary_lock = threading.Lock()
        self._lock = threading.Lock()
        self._kept: OrderedDict[_Key, Future[LLMatcher]] = OrderedDict()
        self._num_bytes = 0

    def compile(self, grammar: Grammar, salt: str, *, ignores_eos: bool) -> GrammarMatcher:
        """A matcher of a grammar. Blocks the thread. Raises GrammarError.

        `salt`: the tenant's. Tenants share no compiled grammar, because the time of a call would
        tell one what another uses. `ignores_eos`: the end of the text is never allowed.
        """
        start = self._compiled((salt, grammar))
        end_ids = frozenset() if ignores_eos else self._eos_token_ids
        return GrammarMatcher(start, self._vocab_size, end_ids)

    def _compiled(self, key: _Key) -> LLMatcher:
        with self._lock:
            found = self._kept.get(key)
            if found is not None:
                self._kept.move_to_end(key)
            else:
                mine = self._kept[key] = Future()
                self._num_bytes += _num_bytes(key)
                self._shrink()
        if found is not None:
            return found.result()
        try:
            mine.set_result(self._compile(key[1]))
        except BaseException as error:
            self._forget(key, mine)
            mine.set_exception(error)
        return mine.result()

    def _compile(self, grammar: Grammar) -> LLMatcher:
        text = llguidance_text(grammar)
        matcher = LLMatcher(self._open_vocabulary(), text, log_level=0, limits=LIMITS)
        if matcher.is_error():
            raise GrammarError(_reason(matcher.get_error()))
        return matcher

    def _open_vocabulary(self) -> LLTokenizer:
        with self._vocabulary_lock:
            if self._vocabulary is None:
                self._vocabulary = open_vocabulary(self._tokenizer, self._vocab_size)
            return self._vocabulary

    def _shrink(self) -> None:
        """Forget the grammars that were used longest ago, if there are too many. Needs the lock."""
        while len(self._kept) > _MAX_KEPT or self._num_bytes > _MAX_KEPT_BYTES:
            key, _ = self._kept.popitem(last=False)
            self._num_bytes -= _num_bytes(key)

    def _forget(self, key: _Key, future: "Future[LLMatcher]") -> None:
        with self._lock:
            if self._kept.get(key) is future:
                del self._kept[key]
                self._num_bytes -= _num_bytes(key)


def _num_bytes(key: _Key) -> int:
    return len(key[0]) + len(key[1].text)
