"""Verifying drafts: how many of the tokens that were drawn for a sequence count."""

from collections.abc import Iterator
from collections.abc import Sequence as Items
from typing import NamedTuple

from sagellm.runtime.engine.batch import Batch
from sagellm.runtime.engine.runner import Drawn
from sagellm.runtime.engine.sequence import Sequence


class Verified(NamedTuple):
    """The rows of `Drawn` that count for a sequence; `is_broken`: the row behind them is none."""

    sequence: Sequence
    rows: range
    is_broken: bool


def verified(batch: Batch, drawn: Drawn) -> Iterator[Verified]:
    """What every drawing sequence has got: one token, and one more for each draft that was right.

    Each token was drawn behind the tokens before it, so it is what a step of its own would have
    drawn; the first that differs from its draft is right as well, and the last that counts.
    """
    if not batch.drafts and not drawn.broken:  # most steps
        for row, sequence in enumerate(batch.drawing):
            yield Verified(sequence, range(row, row + 1), False)
        return
    first = 0
    for sequence in batch.drawing:
        drafts = batch.drafts.get(sequence, ())
        rows = range(first, first + 1 + len(drafts))
        num_right = _num_right(drafts, drawn.token_ids[rows.start : rows.stop])
        are_broken = [row in drawn.broken for row in rows[: num_right + 1]]
        num_sound = are_broken.index(True) if True in are_broken else len(are_broken)
        yield Verified(sequence, rows[:num_sound], num_sound < len(are_broken))
        first = rows.stop


def _num_right(drafts: Items[int], token_ids: Items[int]) -> int:
    """How many drafts were drawn as guessed, up to the first that was not."""
    pairs = enumerate(zip(drafts, token_ids, strict=False))
    return next((at for at, (guess, token_id) in pairs if guess != token_id), len(drafts))
