"""Speculative decoding: how many tokens a step drafts, and how many drafts were right."""

import math
from collections.abc import Iterator, Mapping
from collections.abc import Sequence as Items
from dataclasses import dataclass
from itertools import count, repeat
from typing import Protocol, TypeAlias

import trio

from sagellm.backends import Sampled
from sagellm.graphs.log import get_logger
from sagellm.runtime.engine.batch import Batch
from sagellm.runtime.engine.scheduler import Scheduler
from sagellm.runtime.engine.sequence import Sequence
from sagellm.runtime.port import DraftCounts

log = get_logger("sagellm.engine")

# For the draft length of one sequence.
_DECAY = 0.75  # weight of older drafts, for each step with drafts: the last four steps count most
_PRIOR = 2.0  # the rate of the engine counts as much as this number of tested tokens
_FIRST_PAUSE, _LONGEST_PAUSE = 8, 256  # steps without a draft

# For the times of steps.
_WEIGHT = 0.2  # of the newest step in the mean of its size
_OUTLIER = 2.0  # a step counts as at most this multiple of the mean: the machine was busy elsewhere
_FINE = 16  # up to this number of rows, each number of rows has a mean of its own
_NEAR = 1.5  # a size that differs by more than this factor says little about a step
_LEAST = 0.1  # the least price of a row: drafts that are right less often only fill the batch


class Acceptance:
    """The rate at which draft tokens are accepted, with more weight on the latest drafts."""

    def __init__(self, decay: float, right: float = 0.0, tested: float = 0.0) -> None:
        self._decay = decay
        self._right = right
        self._tested = tested

    def learn(self, num_drafts: int, num_right: int) -> None:
        # Drafts after the first wrong draft were never tested.
        self._right = self._right * self._decay + num_right
        self._tested = self._tested * self._decay + min(num_drafts, num_right + 1)

    def rate(self, prior: float) -> float:
        """The rate. It is near `prior` while few drafts have been tested."""
        return (self._right + _PRIOR * prior) / (self._tested + _PRIOR)


class DraftLength:
    """The draft length of one sequence, at most `most` tokens.

    The length grows by one when all drafts were right. When a draft was wrong, the length halves,
    but not below the number of right drafts. When not even one token pays, the sequence pauses,
    each time for twice as many steps, and then drafts a single token on trial. Pauses are counted
    in steps, not in seconds.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._length = most
        self._acceptance = Acceptance(_DECAY)
        self._pause = 0  # steps that are left of the pause
        self._next_pause = _FIRST_PAUSE
        self._is_on_trial = False

    def next(self, price: float, prior: float) -> int:
        """Choose the number of tokens to draft in this step.

        `price`: the cost of one more row, in the answer tokens that steps without drafts give in
        the same time. `prior`: the acceptance rate of the whole engine.
        """
        if self._pause:
            self._pause -= 1
            return 0
        if self._is_on_trial:
            return 1
        length = min(self._length, _affordable(price, self._acceptance.rate(prior)))
        if not length:
            self._start_pause()
        return length

    def learn(self, num_drafts: int, num_right: int) -> None:
        """Record the outcome of a step with at least one draft."""
        self._acceptance.learn(num_drafts, num_right)
        was_trial, self._is_on_trial = self._is_on_trial, False
        if num_right == num_drafts:
            self._length = min(self._most, self._length + 1)
            if not was_trial:
                self._next_pause = _FIRST_PAUSE
        else:
            self._length = max(num_right, num_drafts // 2)
            if not self._length:
                self._start_pause()

    def _start_pause(self) -> None:
        self._pause, self._is_on_trial = self._next_pause, True
        self._length = max(self._length, 1)
        self._next_pause = min(2 * self._next_pause, _LONGEST_PAUSE)


def _affordable(price: float, rate: float) -> int:
    """The longest draft whose last token is right with a probability of at least `price`."""
    if rate < price:
        return 0
    return int(math.log(price) / math.log(min(rate, 0.99)) + 1e-9)


@dataclass(slots=True)
class _Size:
    """The mean number of rows, and the mean seconds, of steps of about the same size."""

    rows: float
    seconds: float

    def add(self, rows: int, seconds: float) -> None:
        self.rows += _WEIGHT * (rows - self.rows)
        self.seconds += _WEIGHT * (min(seconds, _OUTLIER * self.seconds) - self.seconds)


class StepTimes:
    """Moving averages of the step time, by number of rows. The slope of a line through the averages
    of nearby sizes is the time of one more row.

    Each size counts once, however often it was observed: steps without drafts are rare when all
    drafts are right. Only steps without prompts are observed.
    """

    def __init__(self) -> None:
        self._sizes: dict[int, _Size] = {}

    def observe(self, rows: int, seconds: float) -> None:
        key = _key(rows)
        if key in self._sizes:
            self._sizes[key].add(rows, seconds)
        else:
            self._sizes[key] = _Size(rows, seconds)

    def price(self, num_decodes: int, num_rows: int, *, most: int, token_s: float) -> float:
        """The cost of one more row, in the answer tokens that steps without drafts give in the same
        time. At least 0.1.

        Without drafts, the step has `num_rows` rows and gives `num_decodes` tokens. With every
        draft it has `most` rows. `token_s`: the time to draft one token, in seconds. At a price of
        1 a row costs as much as a token is worth, so not even a sure draft gains anything.
        """
        near = [
            size
            for size in self._sizes.values()
            if num_decodes / _NEAR <= size.rows <= most * _NEAR
        ]
        if not near:
            return _LEAST
        rows = sum(size.rows for size in near) / len(near)
        seconds = sum(size.seconds for size in near) / len(near)
        spread = sum((size.rows - rows) ** 2 for size in near)
        slope = sum((size.rows - rows) * (size.seconds - seconds) for size in near)
        row_s = max(0.0, slope / spread) if spread else 0.0
        step_s = seconds + row_s * (num_rows - rows)
        return max(_LEAST, (row_s + token_s) * num_decodes / step_s) if step_s > 0 else _LEAST


def _key(rows: int) -> int:
    """The size class of a step: the number of rows, up to 16. Above 16 the number is rounded down
    to its three leading binary digits.
    """
    coarse = max(0, rows.bit_length() - 3) if rows > _FINE else 0
    return rows >> coarse << coarse


_PLAIN_EVERY = 64  # steps between two steps without drafts, whose time is needed to price drafts
_ENGINE_DECAY = 0.98


class Drafter(Protocol):
    """Guesses the next tokens of sequences. It may keep data of each sequence until `forget`."""

    async def draft(self, wanted: Mapping[Sequence, int]) -> dict[Sequence, list[int]]:
        """Draft at most `wanted[sequence]` next tokens of each sequence. Sequences without a draft
        are left out of the result.

        Since the previous call, `Sequence.tokens` may have grown, but earlier tokens have not
        changed.
        """
        ...

    @property
    def token_s(self) -> float:
        """The recent mean time to draft one token, in seconds."""
        ...

    def forget(self, sequence: Sequence) -> None:
        """Drop the data of a sequence that has left the engine. Ignores an unknown sequence."""
        ...

    def clear(self) -> None:
        """Forget every sequence."""
        ...


class Speculation:
    """Drafts up to `num_tokens` tokens for sequences that decode, as long as drafts pay.

    A sequence drafts from its second token on: the first token belongs to the prefill. Drafts use
    the part of the token budget that prompts leave, and blocks that no sequence waits for. Draft
    lengths depend on tokens and on step times, but sampled tokens never depend on drafts.
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
        """Draft tokens for the decodes of a scheduled batch, and add the drafts to the batch. The
        batch must be the next to run.
        """
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
        """Record the time of the step whose batch was passed to `extend` last. Called after the
        step.
        """
        if batch.is_decoding:
            self._step_times.observe(batch.num_tokens, trio.current_time() - self._started_s)
            self._until_plain = self._until_plain - 1 if batch.drafts else _PLAIN_EVERY

    def learn(self, sequence: Sequence, num_drafts: int, num_right: int) -> None:
        """Record how many drafts of one sequence were right."""
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
        """Choose how many tokens to draft for each sequence, at most `room` in all."""
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


# A sequence, its accepted rows of `Sampled`, and whether the next row has broken logits.
Verified: TypeAlias = tuple[Sequence, range, bool]


def verified(batch: Batch, sampled: Sampled) -> Iterator[Verified]:
    """Yield, for each sampling sequence, the rows of accepted tokens: one row, and one more for
    each right draft.

    Each accepted token was sampled after right tokens only, so a step without drafts would have
    sampled it too. This includes the first token that differs from its draft; later rows are not
    accepted.
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
    """The number of drafts before the first that differs from its sampled token."""
    pairs = enumerate(zip(drafts, token_ids, strict=False))
    return next((at for at, (guess, token_id) in pairs if guess != token_id), len(drafts))
