"""An engine as a synchronous model, without tasks and clock: it jumps from one change of its batch
to the next.
"""

from bisect import bisect_right, insort
from math import inf

from sagellm.runtime.engine.options import Limits
from sagellm.runtime.engine.step_cost import (
    ModelledRun,
    ModelledSequence,
    SequenceKey,
    SequenceProgress,
    StepCost,
    step_shape,
)
from sagellm.runtime.engine.token_budget import decode_budget, share_budget
from sagellm.runtime.messages import NORMAL, FinishReason
from sagellm.runtime.port import EngineLoad


class EngineModel:
    """Schedules as `Scheduler` does, with the same `share_budget`. Each step takes the time that
    `cost` gives. The model's own running time grows with changes of the batch, not with tokens. A
    change is an arrival, a chunk of a prompt, an end, or a full pool. If more sequences decode than
    `max_num_batched_tokens`, each step is a change.

    The caller passes times, in seconds, which never go back. Submit and cancel all sequences of one
    time before `advance` to that time: sequences that arrive together start together, as in an
    engine that finds both when its step ends.

    The model knows numbers of tokens, not tokens. The cached tokens of a sequence (`num_cached`)
    take blocks of its own: no blocks are shared. If the pool is full, the sequence last in rank is
    preempted, and later computed again from its beginning, as in an engine without
    `prefix_caching`. An engine with `prefix_caching` may reuse some of those blocks, and finish
    earlier than this model.
    """

    def __init__(self, cost: StepCost, limits: Limits, *, num_blocks: int, block_size: int) -> None:
        self.num_preemptions = 0
        self.num_changes = 0  # of the batch, on which the running time of the model depends
        self.num_steps = 0
        self._cost = cost
        self._limits = limits
        self._num_blocks = num_blocks
        self._block_size = block_size
        self._num_free = num_blocks
        self._watermark = num_blocks // 100  # as in Scheduler
        self._sequences: dict[SequenceKey, ModelledSequence] = {}
        self._running: list[ModelledSequence] = []
        self._waiting: list[ModelledSequence] = []  # in rank order
        self._num_arrivals = 0
        self._sat_out = False
        self._run: ModelledRun | None = None
        self._time_s = 0.0  # of the last change
        self._progress: list[SequenceProgress] = []

    def submit(
        self,
        key: SequenceKey,
        now: float,
        *,
        num_prompt: int,
        num_output: int,
        num_emitted: int = 0,
        num_cached: int = 0,
        priority: int = NORMAL,
    ) -> None:
        """Queue a sequence of `num_prompt` tokens, which ends after `num_output` tokens.

        `num_emitted`: tokens of the answer that a resumed sequence has already. `num_cached`:
        tokens that need not be computed; at least the last token is computed. Raises ValueError for
        numbers that no engine takes.
        """
        num_known = num_prompt + num_emitted
        if key in self._sequences or num_prompt < 1 or not 0 <= num_emitted < num_output:
            raise ValueError(f"{key} runs here already, or has no tokens to compute or to emit")
        if self._blocks_for(num_prompt + num_output) > self._num_blocks:
            raise ValueError(f"{key} does not fit the pool of {self._num_blocks} blocks")
        self._catch_up(now)
        self._num_arrivals += 1
        rank = priority, self._num_arrivals
        cached = min(num_cached, num_known - 1)
        sequence = ModelledSequence(key, rank, num_prompt, num_output, num_emitted, cached)
        sequence.num_reported = num_emitted
        self._sequences[key] = sequence
        self._queue(sequence)
        if len(self._running) < self._limits.max_num_seqs:
            self._cut_run(now)

    def cancel(self, key: SequenceKey, now: float) -> None:
        """End a sequence, at once or after the step that computes it. Ignores an unknown key."""
        self._catch_up(now)
        sequence = self._sequences.get(key)
        if sequence is None:
            return
        if self._run is not None and any(row is sequence for row, _ in self._run.rows):
            sequence.is_cancelled = True
        else:
            self._end(sequence, now, "cancelled")
        self._cut_run(now)

    def advance(self, now: float) -> list[SequenceProgress]:
        """Advance to `now`. Return the progress since the previous call, in order of time."""
        self._catch_up(now, is_whole=True)
        progress, self._progress = self._progress, []
        return progress

    @property
    def next_at(self) -> float:
        """The time of the next change of the batch, in seconds; infinite if no token is left to
        compute.
        """
        if self._progress or (self._run is None and self._sequences):
            return self._time_s
        return inf if self._run is None else self._run.end_s

    @property
    def load(self) -> EngineLoad:
        """The load after the last change."""
        pending = (one.num_pending for one in self._running if one.num_pending > 1)
        waiting = (one.num_known - one.num_cached for one in self._waiting)
        return EngineLoad(
            num_running=len(self._running),
            num_waiting=len(self._waiting),
            num_pending_prefill_tokens=sum(pending) + sum(waiting),
            num_free_blocks=self._num_free,
            num_leased_blocks=self._num_blocks - self._num_free,
            num_blocks=self._num_blocks,
            num_preemptions=self.num_preemptions,
            num_steps=self.num_steps,
        )

    # ---- time ------------------------------------------------------------------------------

    def _catch_up(self, now: float, *, is_whole: bool = False) -> None:
        """Advance to `now`: end each run that is over by `now`, and start each run that begins
        before `now`. With `is_whole`, also start a run that begins at `now`.
        """
        while True:
            if self._run is not None:
                if self._run.end_s > now:
                    return
                self._finish(self._run)
            elif self._sequences and (self._time_s < now or (is_whole and self._time_s == now)):
                self._start()
            else:
                self._time_s = max(self._time_s, now)
                return

    def _cut_run(self, now: float) -> None:
        """End the run after the step that computes at `now`, because the batch changes after that
        step.
        """
        run = self._run
        if run is None or run.num_steps == 1:
            return
        steps = range(1, run.num_steps)
        num_over = bisect_right(steps, now, key=lambda count: self._end_s(run, count))
        run.num_steps = num_over + 1
        run.end_s = self._end_s(run, run.num_steps)

    def _end_s(self, run: ModelledRun, num_steps: int) -> float:
        return run.begun_s + self._cost.run_seconds(run.shape, num_steps)

    # ---- one change of the batch -------------------------------------------------------------

    def _start(self) -> None:
        """Schedule, and begin a run of the scheduled batch."""
        self.num_changes += 1
        num_preemptions = self.num_preemptions
        decodes = self._grow_decodes()
        if self.num_preemptions == num_preemptions:
            decodes += self._admit()
        prefills = [one for one in self._running if one.num_pending > 1]
        rows = self._rows(decodes, prefills)
        shape = step_shape((one.num_computed, count, one.num_prompt) for one, count in rows)
        is_alike = len(rows) == len(decodes) and not prefills
        is_alike = is_alike and self.num_preemptions == num_preemptions
        num_steps = self._num_alike(decodes) if is_alike else 1
        self._run = run = ModelledRun(self._time_s, rows, shape, num_steps)
        run.end_s = self._end_s(run, num_steps)

    def _finish(self, run: ModelledRun) -> None:
        """Apply the outcome of a run to its sequences."""
        self._run, self._time_s = None, run.end_s
        self.num_steps += run.num_steps
        for sequence, count in run.rows:
            is_sampling = count == sequence.num_pending
            sequence.num_computed += count + run.num_steps - 1
            self._grow(sequence, sequence.num_computed)
            # A sequence that was cancelled during the step does not emit the token of the step.
            sequence.num_emitted += run.num_steps - sequence.is_cancelled if is_sampling else 0
        for sequence, _ in run.rows:
            if sequence.is_cancelled:
                self._end(sequence, run.end_s, "cancelled")
            elif sequence.num_emitted >= sequence.num_output:
                self._end(sequence, run.end_s, "length")
            elif sequence.num_emitted > sequence.num_reported and not sequence.has_reported:
                self._report(sequence, run.end_s)

    def _rows(
        self, decodes: list[ModelledSequence], prefills: list[ModelledSequence]
    ) -> list[tuple[ModelledSequence, int]]:
        """Choose how many tokens of each sequence one step computes. Decodes past the budget take
        turns.
        """
        budget = self._limits.max_num_batched_tokens
        room = decode_budget(budget, has_prefills=bool(prefills))
        rows = [(sequence, 1) for sequence in decodes[:room]]
        if len(decodes) > room:
            for sequence in decodes[:room]:
                self._running.remove(sequence)
                self._running.append(sequence)
        if prefills:
            left = budget - len(rows)
            shares, self._sat_out = share_budget(prefills, left, self._chunk, sat_out=self._sat_out)
            rows += shares
        return rows

    def _chunk(self, sequence: ModelledSequence, budget: int) -> int:
        return min(sequence.num_pending, self._limits.prefill_chunk or budget, budget)

    def _num_alike(self, decodes: list[ModelledSequence]) -> int:
        """The number of steps in which the same sequences decode: until one ends or the pool is
        full.
        """
        if not all(one.is_decoding and one.has_reported for one in decodes):
            return 1
        most = min(one.num_output - one.num_emitted for one in decodes)
        if self._num_needed(decodes, most) <= self._num_free:
            return most
        counts = range(1, most)
        fitting = bisect_right(
            counts, self._num_free, key=lambda count: self._num_needed(decodes, count)
        )
        return max(1, fitting)

    def _num_needed(self, decodes: list[ModelledSequence], num_steps: int) -> int:
        """The number of blocks that `num_steps` steps need beyond the blocks of their sequences."""
        return sum(
            self._blocks_for(one.num_known + num_steps - 1) - one.num_blocks for one in decodes
        )

    # ---- scheduling, as in Scheduler ---------------------------------------------------------

    def _grow_decodes(self) -> list[ModelledSequence]:
        decodes = []
        for sequence in tuple(self._running):
            is_next = sequence.num_blocks > 0 and sequence.num_pending == 1
            if is_next and self._make_room(sequence):
                decodes.append(sequence)
        return [sequence for sequence in decodes if sequence.num_blocks]

    def _make_room(self, sequence: ModelledSequence) -> bool:
        """Give a decode its next block, and preempt the sequence last in rank if none is free.
        Return False if the decode itself was preempted.
        """
        if sequence.num_known <= sequence.num_blocks * self._block_size:
            return True
        while not self._num_free:
            victim = max(self._running, key=lambda running: running.rank)
            self._preempt(victim)
            if victim is sequence:
                return False
        self._grow(sequence, sequence.num_known)
        return True

    def _preempt(self, sequence: ModelledSequence) -> None:
        self.num_preemptions += 1
        self._running.remove(sequence)
        self._free(sequence)
        sequence.num_computed = sequence.num_cached = 0
        self._queue(sequence)

    def _admit(self) -> list[ModelledSequence]:
        """Start waiting sequences while slots and blocks last. Return the decodes among them."""
        admitted: list[ModelledSequence] = []
        num_slots = self._limits.max_num_seqs - len(self._running)
        for sequence in self._waiting[: max(num_slots, 0)]:
            num_blocks = self._blocks_for(sequence.num_known)
            spare = self._watermark if self._num_free < self._num_blocks else 0
            if num_blocks + spare > self._num_free:
                break
            self._grow(sequence, sequence.num_known)
            sequence.num_computed = sequence.num_cached
            admitted.append(sequence)
        self._running += admitted
        del self._waiting[: len(admitted)]
        return [sequence for sequence in admitted if sequence.num_pending == 1]

    def _queue(self, sequence: ModelledSequence) -> None:
        insort(self._waiting, sequence, key=lambda waiting: waiting.rank)

    # ---- blocks and ends ---------------------------------------------------------------------

    def _blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self._block_size)

    def _grow(self, sequence: ModelledSequence, num_tokens: int) -> None:
        num_new = max(0, self._blocks_for(num_tokens) - sequence.num_blocks)
        sequence.num_blocks += num_new
        self._num_free -= num_new

    def _free(self, sequence: ModelledSequence) -> None:
        self._num_free += sequence.num_blocks
        sequence.num_blocks = 0

    def _end(self, sequence: ModelledSequence, at_s: float, reason: FinishReason) -> None:
        self._free(sequence)
        del self._sequences[sequence.key]
        queue = self._running if sequence in self._running else self._waiting
        queue.remove(sequence)
        self._report(sequence, at_s, reason)

    def _report(
        self, sequence: ModelledSequence, at_s: float, end: FinishReason | None = None
    ) -> None:
        num_tokens = sequence.num_emitted - sequence.num_reported
        sequence.num_reported, sequence.has_reported = sequence.num_emitted, True
        self._progress.append(SequenceProgress(sequence.key, num_tokens, at_s, end))
