"""An engine as a synchronous model, without tasks and clock: it jumps from one change of its batch
to the next.
"""

from bisect import bisect_right
from collections.abc import Callable, Sequence
from math import inf

from sagellm.runtime.containers import bucket_of
from sagellm.runtime.engine.block_model import BlockModel, KeptBlocks
from sagellm.runtime.engine.costs.spread import StepVariation
from sagellm.runtime.engine.options import Limits
from sagellm.runtime.engine.scheduler_model import SchedulerModel
from sagellm.runtime.engine.step_cost import (
    CostModel,
    ModelledRun,
    ModelledSequence,
    SequenceKey,
    SequenceProgress,
    StepShape,
    step_shape,
)
from sagellm.runtime.messages import NORMAL, FinishReason
from sagellm.runtime.port import EngineLoad


class EngineModel:
    """Schedules as `Scheduler` does, with the same `share_budget`. Each step takes the time that
    `cost` gives; with `variation`, a time that is drawn about it. The model's own running time
    grows with changes of the batch, not with tokens. A change is an arrival, a chunk of a prompt,
    an end, or a full pool. If more sequences decode than `max_num_batched_tokens`, each step is a
    change.

    The caller passes times, in seconds, which never go back. Submit and cancel all sequences of one
    time before `advance` to that time: sequences that arrive together start together, as in an
    engine that finds both when its step ends.

    The model knows numbers of tokens, not tokens. With `span` above 0, each `span` tokens of a
    prompt may have a key, and sequences with equal keys share blocks (`BlockModel`). Without keys,
    the cached tokens of a sequence (`num_cached`) take blocks of its own. If the pool is full, the
    sequence last in rank is preempted, and later computed again from its beginning, or from the end
    of its cached spans. An engine with `prefix_caching` may reuse more blocks, and finish earlier.

    `reserve`, `release` and the option `holds` of `submit` are the two ends of a transfer: a
    sequence that `holds` keeps its blocks after its end, until `release`; blocks that were reserved
    or held under its key are adopted by the next sequence of that key.
    """

    def __init__(
        self,
        cost: CostModel,
        limits: Limits,
        *,
        num_blocks: int,
        block_size: int,
        span: int = 0,
        variation: StepVariation | None = None,
    ) -> None:
        self.num_changes = 0  # of the batch, on which the running time of the model depends
        self.num_steps = 0
        self.num_rows = 0  # of the last step
        self.busy_s = 0.0  # the time of all steps
        self.on_run: Callable[[StepShape, int, float], None] | None = None  # called after each run
        self.gaps: dict[int, int] = {}  # times between tokens: bucket of a histogram -> number
        self.blocks = BlockModel(num_blocks, block_size, span)
        self._cost = cost
        self._variation = variation
        self._scheduler = SchedulerModel(limits, self.blocks)
        self._sequences: dict[SequenceKey, ModelledSequence] = {}
        self._num_arrivals = 0
        self._run: ModelledRun | None = None
        self._is_stuck = False  # no sequence can go on until blocks are released
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
        keys: Sequence[bytes] = (),
        holds: bool = False,
    ) -> None:
        """Queue a sequence of `num_prompt` tokens, which ends after `num_output` tokens.

        `num_emitted`: tokens of the answer that a resumed sequence has already. `num_cached`:
        tokens that need not be computed; at least the last token is computed. `keys`: one for each
        `span` tokens of the prompt. Raises ValueError for numbers that no engine takes.
        """
        num_known = num_prompt + num_emitted
        if key in self._sequences or num_prompt < 1 or not 0 <= num_emitted < num_output:
            raise ValueError(f"{key} runs here already, or has no tokens to compute or to emit")
        if self.blocks.blocks_for(num_prompt + num_output) > self.blocks.num_blocks:
            raise ValueError(f"{key} does not fit the pool of {self.blocks.num_blocks} blocks")
        self._catch_up(now)
        self._num_arrivals += 1
        rank = priority, self._num_arrivals
        cached = min(num_cached, num_known - 1)
        sequence = ModelledSequence(key, rank, num_prompt, num_output, num_emitted, cached)
        sequence.num_reported = num_emitted
        sequence.keys, sequence.holds = keys, holds
        self._sequences[key] = sequence
        kept = self.kept.take(key)
        if kept is None:
            self._scheduler.queue(sequence)
        else:
            self._scheduler.adopt(sequence, kept)
        self._is_stuck = False
        if self._scheduler.has_slot:
            self._cut_run(now)

    def reserve(self, key: SequenceKey, now: float, *, num_tokens: int) -> None:
        """Queue a reservation of blocks for `num_tokens`. `kept.granted` has the key once they are
        there, which may be at once. No sequence of the key is in this engine.
        """
        self._catch_up(now)
        self._num_arrivals += 1
        self.kept.reserve(key, self._num_arrivals, num_tokens)
        self._grant(now)

    def release(self, key: SequenceKey, now: float) -> None:
        """Free the blocks that are held or reserved under a key; an unknown key is ignored."""
        self._catch_up(now)
        self.kept.release(key)
        self._grant(now)

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

    def emptied(self, now: float) -> "EngineModel":
        """A new model with an empty pool, which goes on with the counters of this one."""
        blocks, limits = self.blocks, self._scheduler.limits
        sizes = {"num_blocks": blocks.num_blocks, "block_size": blocks.block_size}
        other = EngineModel(
            self._cost, limits, **sizes, span=blocks.span, variation=self._variation
        )
        other.num_changes = self.num_changes  # no draw of the lost engine comes again
        other.num_steps, other.busy_s, other.gaps = self.num_steps, self.busy_s, self.gaps
        other.blocks.num_evicted = blocks.num_evicted
        other._scheduler.count_on(self._scheduler)
        other._time_s, other.on_run = now, self.on_run
        return other

    @property
    def next_at(self) -> float:
        """The time of the next change of the batch, in seconds; infinite if no token is left to
        compute.
        """
        if self._progress or (self._run is None and self._can_start):
            return self._time_s
        return inf if self._run is None else self._run.end_s

    @property
    def load(self) -> EngineLoad:
        """The load after the last change."""
        scheduler, blocks = self._scheduler, self.blocks
        pending = (one.num_pending for one in scheduler.running if one.num_pending > 1)
        waiting = (one.num_known - one.num_cached for one in scheduler.waiting)
        return EngineLoad(
            num_running=len(scheduler.running),
            num_waiting=len(scheduler.waiting) + len(scheduler.adopted),
            num_pending_prefill_tokens=sum(pending) + sum(waiting),
            num_free_blocks=blocks.num_free,
            num_cached_blocks=blocks.num_cached,
            num_leased_blocks=blocks.num_blocks - blocks.num_available,
            num_blocks=blocks.num_blocks,
            peak_leased_blocks=scheduler.peak_leased_blocks,
            num_preemptions=scheduler.num_preemptions,
            num_steps=self.num_steps,
            num_prefix_queries=scheduler.num_queried_tokens,
            num_prefix_hits=scheduler.num_hit_tokens,
            num_evicted_blocks=blocks.num_evicted,
        )

    @property
    def num_preemptions(self) -> int:
        return self._scheduler.num_preemptions

    @property
    def kept(self) -> KeptBlocks:
        """The blocks that are reserved or held for transfers."""
        return self._scheduler.kept

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
            elif self._can_start and (self._time_s < now or (is_whole and self._time_s == now)):
                self._start()
            else:
                self._time_s = max(self._time_s, now)
                return

    def _grant(self, now: float) -> None:
        """Grant reservations. The steps under way take their blocks first: the run is cut to them,
        because the batch may change after it.
        """
        self._cut_run(now)
        if self._run is not None:
            for sequence, _ in self._run.rows:
                if sequence.is_decoding:
                    self.blocks.grow(sequence, sequence.num_known + self._run.num_steps - 1)
        self._scheduler.grant()

    @property
    def _can_start(self) -> bool:
        return bool(self._sequences) and not self._is_stuck

    def _cut_run(self, now: float) -> None:
        """End the run after the step that computes at `now`, because the batch changes after that
        step.
        """
        self._is_stuck = False
        run = self._run
        if run is None or run.num_steps == 1:
            return
        steps = range(1, run.num_steps)
        num_over = bisect_right(steps, now, key=lambda count: self._end_s(run, count))
        run.num_steps = num_over + 1
        run.end_s = self._end_s(run, run.num_steps)

    def _end_s(self, run: ModelledRun, num_steps: int) -> float:
        seconds = self._cost.run_seconds(run.shape, num_steps)
        return run.begun_s + seconds * run.variation.factor(num_steps)

    # ---- one change of the batch -------------------------------------------------------------

    def _start(self) -> None:
        """Schedule, and begin a run of the scheduled batch."""
        self.num_changes += 1
        rows, is_alike = self._scheduler.schedule()
        self._is_stuck = not rows  # until a call of a method changes what there is
        if self._is_stuck:
            return
        shape = step_shape((one.num_computed, count, one.num_prompt) for one, count in rows)
        for sequence, _ in rows:
            if sequence.begun_s is None:
                sequence.begun_s = self._time_s
        num_steps = self._num_alike([one for one, _ in rows]) if is_alike else 1
        self._run = run = ModelledRun(self._time_s, rows, shape, num_steps)
        if self._variation is not None:
            run.variation = self._variation.draw(self.num_changes, self._cost.seconds(shape))
        run.end_s = self._end_s(run, num_steps)

    def _finish(self, run: ModelledRun) -> None:
        """Apply the outcome of a run to its sequences."""
        self._run, self._time_s = None, run.end_s
        self.num_steps += run.num_steps
        self.num_rows = len(run.rows)
        self.busy_s += run.end_s - run.begun_s
        step_s = (run.end_s - run.begun_s) / run.num_steps
        if self.on_run is not None:
            self.on_run(run.shape, run.num_steps, run.end_s - run.begun_s)
        for sequence, count in run.rows:
            is_sampling = count == sequence.num_pending
            if is_sampling:
                self._count_gaps(sequence, run, step_s)
            sequence.num_computed += count + run.num_steps - 1
            self.blocks.grow(sequence, sequence.num_computed)
            self.blocks.publish(sequence, sequence.num_computed)
            # A sequence that was cancelled during the step does not emit the token of the step.
            sequence.num_emitted += run.num_steps - sequence.is_cancelled if is_sampling else 0
        for sequence, _ in run.rows:
            if sequence.is_cancelled:
                self._end(sequence, run.end_s, "cancelled")
            elif sequence.num_emitted >= sequence.num_output:
                self._end(sequence, run.end_s, "length")
            elif sequence.num_emitted > sequence.num_reported and not sequence.has_reported:
                self._report(sequence, run.end_s)
        if not self._sequences:
            self._scheduler.grant()

    def _count_gaps(self, sequence: ModelledSequence, run: ModelledRun, step_s: float) -> None:
        """Count the times between the tokens of a sequence. The first of a run may be longer than a
        step: the sequence was preempted, or others took its turn.
        """
        num_gaps = run.num_steps
        if sequence.last_s != run.begun_s:
            num_gaps -= 1
            if sequence.has_reported:
                self._count_gap(run.begun_s + step_s - sequence.last_s, 1)
        self._count_gap(step_s, num_gaps)
        sequence.last_s = run.end_s

    def _count_gap(self, seconds: float, number: int) -> None:
        if number:
            bucket = bucket_of(seconds)
            self.gaps[bucket] = self.gaps.get(bucket, 0) + number

    def _num_alike(self, decodes: list[ModelledSequence]) -> int:
        """The number of steps in which the same sequences decode: until one ends or the pool is
        full.
        """
        if not all(one.is_decoding and one.has_reported for one in decodes):
            return 1
        most = min(one.num_output - one.num_emitted for one in decodes)
        if self._num_needed(decodes, most) <= self.blocks.num_available:
            return most
        counts = range(1, most)
        fitting = bisect_right(
            counts, self.blocks.num_available, key=lambda count: self._num_needed(decodes, count)
        )
        return max(1, fitting)

    def _num_needed(self, decodes: list[ModelledSequence], num_steps: int) -> int:
        """The number of blocks that `num_steps` steps need beyond the blocks of their sequences."""
        return sum(
            self.blocks.blocks_for(one.num_known + num_steps - 1) - one.num_blocks
            for one in decodes
        )

    def _end(self, sequence: ModelledSequence, at_s: float, reason: FinishReason) -> None:
        if sequence.holds and reason == "length":
            self.kept.hold(sequence.key, sequence)
        else:
            self.blocks.free(sequence)
        del self._sequences[sequence.key]
        self._scheduler.remove(sequence)
        self._report(sequence, at_s, reason)

    def _report(
        self, sequence: ModelledSequence, at_s: float, end: FinishReason | None = None
    ) -> None:
        num_tokens = sequence.num_emitted - sequence.num_reported
        sequence.num_reported, sequence.has_reported = sequence.num_emitted, True
        times = at_s, end, sequence.begun_s
        self._progress.append(
            SequenceProgress(sequence.key, num_tokens, *times, sequence.num_cached)
        )
