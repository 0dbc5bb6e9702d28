"""The tokens that grammars allow in the rows of a launch, computed while the program runs."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from sagellm.backends.step import LogitsRow, MatcherError

Mask: TypeAlias = npt.NDArray[np.int32]  # [ceil(vocab / 32)], a bit for each token, lowest first

_BITS = 32
# Added to the scores of eight tokens: 0 for those whose bit is set, else -inf. [256, 8]
_BYTES = np.arange(256, dtype=np.uint8)[:, None]
_BIAS_OF_BYTE = np.where(
    np.unpackbits(_BYTES, axis=1, bitorder="little"), np.float32(0), np.float32(-np.inf)
)
THREAD_NAME = "sagellm-grammar"


@dataclass(frozen=True, slots=True)
class TokenMasks:
    """The masks of one launch.

    `rows`: the indices of the rows that follow a grammar. `bits`: the mask of each. `refused`: rows
    whose grammar exceeded its limits, and why; they may sample any token, and their sequences end.
    """

    rows: list[int]
    bits: Mask
    refused: Mapping[int, str] = field(default_factory=dict)


def allowed_tokens(mask: Mask, vocab_size: int) -> npt.NDArray[np.bool_]:
    """Whether a mask allows each token: [vocab_size]."""
    return np.unpackbits(mask.view(np.uint8), count=vocab_size, bitorder="little").view(np.bool_)


LargestAllowed: TypeAlias = Callable[[npt.NDArray[np.float32], Mask], int | None]


def largest_allowed(scores: npt.NDArray[np.float32], mask: Mask) -> int | None:
    """The first of the largest scores [vocab] that a mask allows; None if it allows no token whose
    score is above -inf.

    Only words with a token are read: a mask that forbids the likeliest token allows few others.
    """
    words = mask.nonzero()[0]
    if not len(words):
        return None
    if missing := -len(scores) % _BITS:
        scores = np.pad(scores, (0, missing))
    allowed = scores.reshape(-1, _BITS)[words]
    allowed += np.take(_BIAS_OF_BYTE, mask[words].view(np.uint8), axis=0).reshape(-1, _BITS)
    best = int(allowed.argmax())
    if allowed.flat[best] == -np.inf:
        return None
    return _BITS * int(words[best // _BITS]) + best % _BITS


def token_masks(rows: Sequence[LogitsRow]) -> TokenMasks | None:
    """Compute the masks of `rows`, whose tokens are all known; None if no row has a grammar."""
    bound = [
        (index, row.answer.matcher)
        for index, row in enumerate(rows)
        if row.answer.matcher is not None
    ]
    if not bound:
        return None
    num_words = -(-bound[0][1].vocab_size // _BITS)
    bits = np.empty((len(bound), num_words), dtype=np.int32)
    refused = {}
    for (index, matcher), mask in zip(bound, bits, strict=True):
        try:
            matcher.fill(rows[index].output, mask)
        except MatcherError as error:
            refused[index] = str(error)
            mask[:] = -1
    return TokenMasks([index for index, _ in bound], bits, refused)


def cut_off(rows: Sequence[LogitsRow], exhausted: Iterable[int]) -> dict[int, str]:
    """The rows of `exhausted` whose grammar cannot end where no token is left, and why."""
    found = {}
    for index in exhausted:
        matcher = rows[index].answer.matcher
        try:
            if matcher is not None and not matcher.may_end(rows[index].output):
                found[index] = "no token is left that the grammar and the other options allow"
        except MatcherError as error:
            found[index] = str(error)
    return found


class MaskThread:
    """Computes the masks of one queue's launches on a thread of its own, one launch at a time.

    Matchers release Python's lock, so masks and kernels are computed side by side. The thread
    starts with the first grammar.
    """

    def __init__(self) -> None:
        self._thread: ThreadPoolExecutor | None = None

    def start(self, rows: Sequence[LogitsRow]) -> "Future[TokenMasks | None]":
        """Start to compute the masks of a launch. The tokens of all rows are known."""
        if all(row.answer.matcher is None for row in rows):
            return _NO_MASKS
        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, thread_name_prefix=THREAD_NAME)
        return self._thread.submit(token_masks, rows)

    def close(self) -> None:
        if self._thread is not None:
            self._thread.shutdown()


_NO_MASKS: "Future[TokenMasks | None]" = Future()
_NO_MASKS.set_result(None)
