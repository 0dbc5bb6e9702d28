"""Verifying drafts: how many of the tokens that were sampled for a sequence count."""

from collections.abc import Iterator
from collections.abc import Sequence as Items
from itertools import count, repeat
from typing import TypeAlias

from sagellm.backends import Sampled
from sagellm.runtime.engine.batch import Batch
from sagellm.runtime.engine.sequence import Sequence

# A sequence, the rows of `Sampled` that count for it, and whether the row after them is broken.
Verified: TypeAlias = tuple[Sequence, range, bool]


def verified(batch: Batch, sampled: Sampled) -> Iterator[Verified]:
    """What every sampling sequence has got: one token, and one more for each draft that was right.

    Each token was sampled after the tokens before it, so it is what a step of its own would have
    sampled; the first that differs from its draft is right as well, and the last that counts.
    """
    if not batch.drafts and not sampled.broken:  # most steps
        yield from zip(batch.sampling, map(range, count(), count(1)), repeat(False), strict=False)
        return
    first = 0
    for sequence in batch.sampling:
        drafts = batch.drafts.get(sequence, ())
        rows = range(first, first + 1 + len(drafts))
        num_right = _num_right(drafts, sampled.token_ids[rows.start : rows.stop])
        are_broken = [row in sampled.broken for row in rows[: num_right + 1]]
        num_sound = are_broken.index(True) if True in are_broken else len(are_broken)
        yield sequence, rows[:num_sound], num_sound < len(are_broken)
        first = rows.stop


def _num_right(drafts: Items[int], token_ids: Items[int]) -> int:
    """How many drafts were sampled as guessed, up to the first that was not."""
    pairs = enumerate(zip(drafts, token_ids, strict=False))
    return next((at for at, (guess, token_id) in pairs if guess != token_id), len(drafts))
