"""Matchers: which tokens may follow the output of one sequence."""

import time
from array import array
from collections.abc import Iterable, Sequence
from itertools import compress, count
from operator import ne
from typing import TYPE_CHECKING, NoReturn

from sagellm.backends.step import MatcherError
from sagellm.runtime.grammars.compiled_grammar import DEAD_END, CompiledGrammar
from sagellm.runtime.grammars.reasons import reason

if TYPE_CHECKING:  # gateways check grammars without loading numpy
    from sagellm.backends.token_masks import Mask

_BITS = 32
_NO_STATES = "too many states"  # it may not say so, and only consume nothing


class GrammarMatcher:
    """Follows the grammar of one sequence. Implements `sagellm.backends.step.Matcher`.

    `end_ids`: the tokens that are allowed where the grammar may end, and, unless the grammar names
    them, nowhere else. An output with such a token has left the grammar: all tokens may follow.
    """

    def __init__(self, grammar: CompiledGrammar, vocab_size: int, end_ids: frozenset[int]) -> None:
        self._grammar = grammar
        self._age, self._matcher = grammar.copy()
        self.vocab_size = vocab_size
        self._consumed: list[int] = []
        self._refused: int | None = None  # the token that is known not to follow `_consumed`
        # One more token than the model has: see `open_vocabulary`.
        self._words = array("i", bytes(4 * (vocab_size // _BITS + 1)))
        self._end_bits = _bits(end_ids)
        self._extra_bit = _bits([vocab_size])

    def fill(self, output: Sequence[int], mask: "Mask") -> None:
        begin_s, num_before = time.thread_time(), len(self._consumed)
        if not self._advance(output):
            self._allow_all(mask)
        elif self._compute():
            mask[:] = memoryview(self._words)[: len(mask)]
            if self._end_bits and self._matcher.is_accepting():
                for word, bit in self._end_bits:
                    mask[word] |= bit
        else:
            mask[:] = 0
        self._grammar.account(time.thread_time() - begin_s, len(self._consumed) - num_before)

    def may_end(self, output: Sequence[int]) -> bool:
        is_inside = self._advance(output) and not self._matcher.is_error()
        return is_inside and self._matcher.is_accepting()

    def follow(self, output: Sequence[int]) -> bool:
        """Consume `output`, as a later `fill` would. Returns whether all of it belongs to the
        grammar. Raises MatcherError.
        """
        return self._advance(output)

    def _advance(self, output: Sequence[int]) -> bool:
        """Consume `output`, or its beginning that belongs to the grammar. Returns whether all of it
        does.
        """
        consumed = self._consumed
        num_kept = len(consumed)
        if output[:num_kept] != consumed:
            shorter = min(num_kept, len(output))
            num_kept = next(compress(count(), map(ne, output, consumed)), shorter)
            self._roll_back(num_kept)
        if rest := output[num_kept:]:
            self._consume(list(rest))
        return len(consumed) == len(output)

    def _consume(self, rest: list[int]) -> None:
        """Consume the tokens up to the first that leaves the grammar. Raises MatcherError."""
        if self._matcher.is_error():
            return  # after a dead end, from which no token leads on
        for is_renewed in (False, True):
            num_taken = self._matcher.try_consume_tokens(rest)
            if num_taken:
                self._consumed += rest[:num_taken]
                self._refused = None
                rest = rest[num_taken:]
            if not self._matcher.is_error() and (not rest or self._refuses(rest[0])):
                return
            if is_renewed:
                self._fail()
            self._restart()

    def _refuses(self, token: int) -> bool:
        """Whether the mask forbids a token that was not consumed. If not, a limit is the cause."""
        if token == self._refused:
            return True
        if self._is_computed():
            is_allowed = bool(self._words[token // _BITS] >> token % _BITS & 1)
        else:
            is_allowed = not self._is_dead_end
        self._refused = None if is_allowed else token
        return not is_allowed

    def _roll_back(self, num_kept: int) -> None:
        num_dropped = len(self._consumed) - num_kept
        del self._consumed[num_kept:]
        self._refused = None
        if not self._matcher.rollback(num_dropped):  # after a dead end, for instance
            self._age, self._matcher = self._grammar.copy()
            self._replay()

    def _compute(self) -> bool:
        """Compute the mask. Returns whether any token may follow. Raises MatcherError."""
        if self._is_computed():
            return True
        if self._is_dead_end:
            return False
        self._restart()
        return self._is_computed() or self._fail()

    def _is_computed(self) -> bool:
        words = self._words
        address, _ = words.buffer_info()
        self._matcher.unsafe_compute_mask_ptr(address, len(words) * words.itemsize)
        for word, bit in self._extra_bit:
            words[word] &= ~bit
        return not self._matcher.is_error()

    @property
    def _is_dead_end(self) -> bool:
        return self._matcher.get_error().startswith(DEAD_END)

    def _restart(self) -> None:
        """Go on with another lexer after an error. Raises MatcherError."""
        fault = self._matcher.get_error() or _NO_STATES
        self._age, self._matcher = self._grammar.renewed(self._age, fault)
        self._replay()

    def _replay(self) -> None:
        """Let a new matcher consume what the last one had consumed. Raises MatcherError."""
        self._matcher.try_consume_tokens(self._consumed)
        if self._matcher.is_error():
            self._fail()

    def _fail(self) -> NoReturn:
        self._grammar.is_exhausted = True
        raise MatcherError(reason(self._matcher.get_error() or _NO_STATES))

    def _allow_all(self, mask: "Mask") -> None:
        mask[:] = -1
        if spare := self.vocab_size % _BITS:
            mask[-1] = (1 << spare) - 1


def _bits(token_ids: Iterable[int]) -> list[tuple[int, int]]:
    """The words of tokens in a mask, and their bits, as signed numbers of 32 bits."""
    return [(token // _BITS, _signed(1 << token % _BITS)) for token in token_ids]


def _signed(word: int) -> int:
    return word - (1 << _BITS) if word >> _BITS - 1 else word
