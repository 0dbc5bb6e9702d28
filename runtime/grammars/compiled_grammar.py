"""Compiled grammars: what llguidance made of one, its limits, and what its matchers share."""

import threading

from llguidance import LLMatcher, LLParserLimits, LLTokenizer

from sagellm.backends.step import MatcherError
from sagellm.runtime.grammars import GrammarError
from sagellm.runtime.grammars.llguidance_text import Source
from sagellm.runtime.grammars.reasons import reason

# Measured with 150,000 tokens: the masks of hostile grammars take up to 50 ms, but for ambiguous
# grammars (see below). Schemas with 500 optional properties, or enums of 10,000 texts, fit.
LIMITS = LLParserLimits(
    max_items_in_row=2500,  # an object takes 4 for each optional property
    step_max_items=50_000,
    max_lexer_states=50_000,  # about 30 MB
    max_grammar_size=20_000,
    initial_lexer_fuel=500_000,
    precompute_large_lexemes=False,  # seconds for some expressions, and no limit bounds it
    verbose_errors=False,
)
DEAD_END = "NoExtensionBias"  # how llguidance says that no token may follow
_MIN_FILLS = 500  # masks that a lexer must have served to be worth making anew
# A mask may take this CPU time on average. An ambiguous grammar passes every limit of llguidance,
# and each of its masks takes longer than the one before: 0.2 s when its answer ends here.
_MEAN_FILL_S, _SPARE_S = 0.005, 0.5


class CompiledGrammar:
    """A grammar that is compiled for one vocabulary. Raises GrammarError.

    Its matchers share a lexer. The states of the lexer add up over all answers until their limit;
    then `renewed` makes another. Any thread may call any method.
    """

    def __init__(self, vocabulary: LLTokenizer, source: Source) -> None:
        self._vocabulary = vocabulary
        self._source = source
        self._lock = threading.Lock()
        self._start = self._compile()
        self._age = self._num_fills = 0
        self._slow_s = 0.0
        self.is_exhausted = False  # of no use for further answers: a limit was reached

    def copy(self) -> tuple[int, LLMatcher]:
        """A matcher that has consumed nothing, and the age of its lexer."""
        with self._lock:
            return self._age, self._start.deep_copy()

    def renewed(self, age: int, fault: str) -> tuple[int, LLMatcher]:
        """The same with another lexer than that of `age`, which failed with the message `fault`.
        Raises MatcherError if the grammar itself is the cause.
        """
        with self._lock:
            if age == self._age:
                if self._num_fills < _MIN_FILLS:
                    self.is_exhausted = True
                    raise MatcherError(reason(fault))
                self._renew()
            return self._age, self._start.deep_copy()

    def _renew(self) -> None:
        try:
            self._start = self._compile()
        except GrammarError as error:  # it was compiled before, so the machine is short of memory
            raise MatcherError(str(error)) from error
        self._age += 1
        self._num_fills = 0

    def account(self, cpu_s: float, num_tokens: int) -> None:
        """Count a mask that took `cpu_s` after `num_tokens` more tokens of an output. A resumed
        output has many. Raises MatcherError if masks take too long.
        """
        self._num_fills += 1
        self._slow_s = max(0.0, self._slow_s + cpu_s - _MEAN_FILL_S * max(1, num_tokens))
        if self._slow_s > _SPARE_S:
            self.is_exhausted = True
            raise MatcherError("the grammar takes too long to follow")

    def _compile(self) -> LLMatcher:
        start = LLMatcher(self._vocabulary, self._source.text, log_level=0, limits=LIMITS)
        # llguidance finds some faults, and some exceeded limits, only at the first two tokens.
        probe = start.deep_copy()
        if (token := _first_allowed(probe)) is not None:
            probe.try_consume_tokens([token])
            _first_allowed(probe)
        if probe.is_error() and (token is None or not probe.get_error().startswith(DEAD_END)):
            raise self._source.fault(probe.get_error())
        return start


def _first_allowed(matcher: LLMatcher) -> int | None:
    """The lowest token that may follow; None after an error."""
    mask = matcher.compute_bitmask()
    rest = mask.lstrip(b"\0")
    if matcher.is_error() or not rest:
        return None
    lowest = (rest[0] & -rest[0]).bit_length() - 1
    return 8 * (len(mask) - len(rest)) + lowest
