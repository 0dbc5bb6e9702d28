"""Speculative decoding: which drafts a step gets, and how many of them were right."""

from collections.abc import Iterator, Mapping
from collections.abc import Sequence as Items
from itertools import count, repeat
from typing import Protocol, TypeAlias

import trio

from sagellm.backends import Sampled
from sagellm.graphs.log import get_logger
from sagellm.runtime.engine.batch import Batch
from sagellm.runtime.engine.draft_length import Acceptance, DraftLength, StepTimes
from sagellm.runtime.engine.scheduler import Scheduler
from sagellm.runtime.engine.sequence import Sequence
from sagellm.runtime.port import DraftCounts

log = get_logger("sagellm.engine")

_PLAIN_EVERY = 64  # steps: the time of a step without drafts must be known to price drafts
_ENGINE_DECAY = 0.98


class Drafter(Protocol):
    """Guesses the next tokens of sequences, and keeps what it needs of each until `forget`."""

    async def draft(self, wanted: Mapping[Sequence, int]) -> dict[Sequence, list[int]]:
        """Draft at most `wanted[sequence]` next tokens of each sequence; leave out sequences that
        the drafter has no draft for.

        `Sequence.tokens` may have grown since the last call, but not changed.
        """
        ...

    @property
    def token_s(self) -> float:
        """Seconds that one draft token took lately."""
        ...

    def forget(self, sequence: Sequence) -> None:
        """The sequence has left the engine. An unknown sequence is ignored."""
        ...

    def clear(self) -> None:
        """Forget every sequence."""
        ...


class Speculation:
    """Drafts up to `num_tokens` tokens for sequences that decode, as long as drafts pay.

    A sequence drafts from its second token on: the first token belongs to the prefill. Drafts take
    the tokens of a step that prompts leave, and blocks that no sequence waits for. Draft lengths
    depend on tokens and on step times, but no token ever depends on a draft.
    """

    def __init__(self, drafter: Drafter, num_tokens: int) -> None:
        self.drafter = drafter
        self._num_tokens = num_tokens
        self._lengths: dict[Sequence, DraftLength] = {}
        self._acceptance = Acceptance(_ENGINE_DECAY, 2.0, 3.0)
        self._step_times = StepTimes()
        self._until_plain = 0
        self._started_s = 0.0
        self._num_drafts = 0
        self._num_draft_tokens = 0
        self._accepted_at = [0] * num_tokens
        self._is_broken = False

    @property
    def counts(self) -> DraftCounts:
        return DraftCounts(self._num_drafts, self._num_draft_tokens, tuple(self._accepted_at))

    async def extend(self, batch: Batch, scheduler: Scheduler) -> None:
        """Add drafts to the decodes of a scheduled batch, which must run next."""
        room = scheduler.limits.max_num_batched_tokens - batch.num_tokens
        wanted = {} if self._is_plain(batch) else self._wanted(batch, room)
        if wanted:
            drafted = await self._draft(wanted)
            for index, sequence in enumerate(batch.decodes):
                drafts = drafted.get(sequence)
                if drafts and sequence.forced_end is None:
                    num_drafts = scheduler.grow_for_drafts(sequence, len(drafts))
                    batch.add_drafts(index, drafts[:num_drafts])
        self._started_s = trio.current_time()

    def observe(self, batch: Batch) -> None:
        """Note the time of the step that was extended last, now that it has run."""
        if batch.is_decoding:
            self._step_times.observe(batch.num_tokens, trio.current_time() - self._started_s)
            self._until_plain = self._until_plain - 1 if batch.drafts else _PLAIN_EVERY

    def learn(self, sequence: Sequence, num_drafts: int, num_right: int) -> None:
        """Take the outcome of the drafts of one sequence."""
        if not num_drafts:
            return
        self._lengths[sequence].learn(num_drafts, num_right)
        self._acceptance.learn(num_drafts, num_right)
        self._num_drafts += 1
        self._num_draft_tokens += num_drafts
        for at in range(num_right):
            self._accepted_at[at] += 1

    def forget(self, sequence: Sequence) -> None:
        self._lengths.pop(sequence, None)
        self.drafter.forget(sequence)

    def clear(self) -> None:
        self._lengths.clear()
        self.drafter.clear()

    def _is_plain(self, batch: Batch) -> bool:
        """Whether this step gets no drafts."""
        return self._is_broken or (self._until_plain <= 0 and batch.is_decoding)

    def _wanted(self, batch: Batch, room: int) -> dict[Sequence, int]:
        """The number of tokens to draft for each sequence, at most `room` in all."""
        decodes = batch.decodes
        num_rows, num_drafts = batch.num_tokens, min(room, len(decodes) * self._num_tokens)
        price = self._step_times.price(
            len(decodes), num_rows, most=num_rows + num_drafts, token_s=self.drafter.token_s
        )
        prior = self._acceptance.rate(0.5)
        wanted: dict[Sequence, int] = {}
        for sequence in decodes:
            most = min(sequence.max_output - sequence.num_output - 1, room)
            if most <= 0 or not sequence.num_output or sequence.state.hold_kv:
                continue
            if sequence not in self._lengths:
                self._lengths[sequence] = DraftLength(self._num_tokens)
            length = min(self._lengths[sequence].next(price, prior), most)
            if length:
                wanted[sequence] = length
                room -= length
        return wanted

    async def _draft(self, wanted: Mapping[Sequence, int]) -> Mapping[Sequence, list[int]]:
        """Call the drafter. After it has failed once, the engine goes on without drafts."""
        try:
            return await self.drafter.draft(wanted)
        except Exception as error:
            log.error("draft_failed", exc_info=error)
            self._is_broken = True
            return {}


# A sequence, the rows of `Sampled` that count for it, and whether the row after them is broken.
Verified: TypeAlias = tuple[Sequence, range, bool]


def verified(batch: Batch, sampled: Sampled) -> Iterator[Verified]:
    """The rows that count for every sampling sequence: one, and one more for each right draft.

    Each token was sampled after the tokens before it, so it is what a step of its own would have
    sampled. The first token that differs from its draft counts too, and is the last that counts.
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
    """How many drafts were sampled as guessed, up to the first wrong draft."""
    pairs = enumerate(zip(drafts, token_ids, strict=False))
    return next((at for at, (guess, token_id) in pairs if guess != token_id), len(drafts))
