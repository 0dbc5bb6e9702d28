"""The step behind the one under way, made before that one has drawn its tokens."""

from sagellm.runtime.engine.batch import Batch
from sagellm.runtime.engine.behind import Behind
from sagellm.runtime.engine.scheduler import Scheduler
from sagellm.runtime.engine.sequence import Sequence


def follow(batch: Batch, scheduler: Scheduler) -> Batch | None:
    """One more token for each sequence that goes on behind `batch`, which computes now.

    None where it takes the outcome of `batch` to say who computes next: somebody else could, a
    prompt goes on, drafts were guessed, blocks or the reader's room run out. Else the scheduler
    would choose the same, but for sequences that end in `batch` by what they draw: their part of
    the step is thrown away. Takes the blocks that it needs; a step that is recalled leaves them to
    their sequences.
    """
    if scheduler.is_due or batch.drafts or len(batch.drawing) < len(batch.sequences):
        return None
    drawing = set(batch.drawing)
    if any(other not in drawing and not other.mailbox.is_full for other in scheduler.running):
        return None
    behind = [
        Behind(sequence, source, len(sequence.tokens))
        for source, sequence in enumerate(batch.drawing)
        if _goes_on(sequence)
    ]
    going = [row.sequence for row in behind]
    if len(going) < len(drawing) and (scheduler.num_waiting or scheduler.landings):
        return None  # what it leaves behind goes to them first
    if not going or not _have_room(going) or not scheduler.extend(going):
        return None
    count = len(going)
    return Batch(going, [1] * count, list(going), num_decodes=count, behind=behind)


def _goes_on(sequence: Sequence) -> bool:
    """Whether it draws a second token, for all that is known before it draws the first."""
    is_over = sequence.num_output + 1 >= sequence.max_output or sequence.state.hold_kv
    return sequence.lease is not None and sequence.end is None and not is_over


def _have_room(sequences: list[Sequence]) -> bool:
    """Whether their readers have room for the events of two steps."""
    return all(sequence.mailbox.num_free > 1 for sequence in sequences)
