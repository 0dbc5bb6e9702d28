"""Matchers: which tokens may follow the output of one sequence."""

from collections.abc import Sequence
from itertools import compress, count
from operator import ne

import numpy as np
import numpy.typing as npt
from llguidance import LLMatcher

from sagellm.backends.step import MatcherError

Mask = npt.NDArray[np.int32]


def num_words(num_bits: int) -> int:
    return (num_bits + 31) // 32


class GrammarMatcher:
    """Follows the grammar of one sequence. Implements `sagellm.backends.step.Matcher`.

    `start`: a matcher of llguidance that has consumed nothing; it is copied. `end_ids`: the tokens
    that are allowed where the grammar may end. A token of `end_ids` in an output leaves the grammar
    unless the grammar names it: all tokens may follow.
    """

    def __init__(self, start: LLMatcher, vocab_size: int, end_ids: frozenset[int]) -> None:
        self._start = start
        self._matcher = start.deep_copy()
        self._vocab_size = vocab_size
        self._end_ids = tuple(end_ids)
        self._consumed: list[int] = []
        self._words: Mask = np.zeros(num_words(vocab_size + 1), np.int32)

    @property
    def vocab_size(self) -> int:
        return self._vocab_size

    def fill(self, output: Sequence[int], mask: Mask) -> None:
        if self._advance(output):
            self._fill(mask)
        else:
            _allow_all(mask, self._vocab_size)

    def _advance(self, output: Sequence[int]) -> bool:
        """Consume `output`. Returns whether the grammar has it."""
        consumed = self._consumed
        num_same = len(consumed)
        if output[:num_same] != consumed:
            shorter = min(num_same, len(output))
            num_same = next(compress(count(), map(ne, output, consumed)), shorter)
            self._roll_back(num_same)
        rest = list(output[num_same:])
        if rest:
            num_taken = self._matcher.try_consume_tokens(rest)
            consumed += rest[:num_taken]
            self._check()
        return len(consumed) == len(output)

    def _roll_back(self, num_kept: int) -> None:
        ok = self._matcher.rollback(len(self._consumed) - num_kept)
        del self._consumed[num_kept:]
        if not ok:
            self._matcher = self._start.deep_copy()
            self._matcher.try_consume_tokens(self._consumed)
            self._check()

    def _fill(self, mask: Mask) -> None:
        words = self._words
        matcher = self._matcher
        matcher.unsafe_compute_mask_ptr(words.ctypes.data, words.nbytes)
        if matcher.is_error():
            if matcher.get_error().startswith("NoExtensionBias"):
                mask[:] = 0
                return
            raise MatcherError("the grammar exceeds its limits")
        mask[:] = words[: len(mask)]
        _set_bits(mask, self._vocab_size, (self._vocab_size,), False)
        if self._end_ids and matcher.is_accepting():
            _set_bits(mask, self._vocab_size, self._end_ids, True)

    def _check(self) -> None:
        if self._matcher.is_error():
            raise MatcherError("the grammar exceeds its limits")


def _set_bits(mask: Mask, vocab_size: int, ids: Sequence[int], on: bool) -> None:
    words = mask.view(np.uint32)
    for index in ids:
        word, bit = index // 32, np.uint32(1 << index % 32)
        if word < len(words):
            words[word] = words[word] | bit if on else words[word] & ~bit


def _allow_all(mask: Mask, vocab_size: int) -> None:
    mask[:] = -1
    if vocab_size % 32:
        mask[-1] = (1 << vocab_size % 32) - 1
