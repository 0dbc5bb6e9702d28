"""The engine's loop: schedule, launch, collect, emit."""

from collections.abc import Callable
from contextlib import suppress

import msgspec
import trio

from sagellm.backends import Sampled
from sagellm.graphs.log import get_logger
from sagellm.runtime.engine.batch import Batch
from sagellm.runtime.engine.runner import EngineResources, StepLaunch
from sagellm.runtime.engine.scheduler import Scheduler
from sagellm.runtime.engine.sequence import UNSTARTED, Sequence
from sagellm.runtime.engine.speculation import Speculation, verified
from sagellm.runtime.engine.watchdog import Watchdog
from sagellm.runtime.histograms import Buckets
from sagellm.runtime.kv.lease import Fence, Lease, LeaseEvent
from sagellm.runtime.kv.transfer import PoolTransfers
from sagellm.runtime.messages import ENGINE_FAILED, FinishReason, LeaseRef, Stamps, TokenLogprob
from sagellm.runtime.port import PrefillDone

log = get_logger("sagellm.engine")

STEP_TOKENS = (1, *(8 << power for power in range(12)))  # 8 ... 16384, the buckets of vLLM


class Stepping:
    """The steps of one engine, with async scheduling: as in vLLM, the next step is scheduled and
    launched before the current one has sampled. `name` and `replica` are for the log.
    """

    def __init__(
        self, scheduler: Scheduler, resources: EngineResources, *, name: str, replica: int
    ) -> None:
        self.watchdog = Watchdog()
        self.num_steps = 0
        self.step_tokens = Buckets(STEP_TOKENS)  # computed in one step
        self._scheduler = scheduler
        self._resources = resources
        self._name = name
        self._replica = replica
        self._launched: StepLaunch | None = None  # computes, or is next to
        self._next: StepLaunch | None = None  # begins when that has sampled

    @property
    def is_computing(self) -> bool:
        return self._launched is not None

    def next_batch(self) -> Batch:
        """The batch that is launched already, or a new one; empty where nothing can advance."""
        return self._launched.batch if self._launched else self._scheduler.schedule()

    async def run(self, batch: Batch) -> Sampled | Exception:
        """Compute and sample; the batch's blocks stay leased until this returns.

        The batch after it is launched meanwhile, and computes when this returns.
        """
        now = trio.current_time()
        for sequence in batch.sequences:
            if sequence.stamps is UNSTARTED:
                sequence.stamps = Stamps(started_s=now)
        self.num_steps += 1
        self.watchdog.start(now)
        if self._launched is None:
            batch.begin()
        try:
            return await self._run(batch)
        except Exception as error:
            log.error("step_failed", engine=self._name, replica=self._replica, exc_info=error)
            await self._drop_next()
            return error
        finally:
            batch.end()
            self._launched, self._next = self._next, None
            self.watchdog.finish(trio.current_time())

    def recall(self) -> None:
        """Something came that the next batch does not know: schedule anew, if it has not begun."""
        if self._next is not None and self._next.recall():
            self._scheduler.unschedule(self._next.batch)
            self._next = None

    def clear(self) -> None:
        """Nothing computes any more."""
        self._launched = self._next = None

    async def _run(self, batch: Batch) -> Sampled:
        speculation = self._resources.speculation
        if speculation is not None:
            await speculation.extend(batch, self._scheduler)
        self.step_tokens.observe(batch.num_tokens)
        if self._launched is None:
            self._launched = self._resources.runner.launch(batch)
        try:
            self._launch_next(self._launched)
        except Exception:
            await self._launched.result()  # it still writes blocks
            raise
        sampled = await self._launched.result()
        if speculation is not None:
            speculation.observe(batch)
        return sampled

    def _launch_next(self, launched: StepLaunch) -> None:
        if self._resources.async_scheduling:
            batch = self._scheduler.schedule_next()
            if batch.sequences:
                self._next = self._resources.runner.launch(batch, launched)
                batch.begin()

    async def _drop_next(self) -> None:
        """Wait until nothing computes that was launched after a step that failed."""
        self.recall()
        if self._next is not None:
            with suppress(Exception):
                await self._next.result()
            batch, self._next = self._next.batch, None
            self._scheduler.unschedule(batch, has_begun=True)


_BROKEN_LOGITS = "its logits are not finite; the weights or their dtype are wrong"
_LEASE_EVENT: dict[FinishReason, LeaseEvent] = {
    "stop": "finish",
    "length": "finish",
    "cancelled": "cancel",
    "expired": "expire",
    "refused": "refuse",
    "failed": "crash",
}


class Collector:
    """Keeps the sequences of an engine until they end.

    `on_kv_progress` hears of each step of a prompt that is to be exported, but of the last: how many of
    its blocks of full attention are computed.

    What a step under way writes stays leased until it is collected, also where its sequence has
    ended before.
    """

    def __init__(
        self, scheduler: Scheduler, exchange: PoolTransfers, speculation: Speculation | None
    ) -> None:
        self.sequences: dict[Fence, Sequence] = {}
        self._scheduler = scheduler
        self._exchange = exchange
        self._speculation = speculation
        self.on_kv_progress: Callable[[Lease, int], None] = lambda lease, num_blocks: None
        self._left: list[tuple[Lease, LeaseEvent]] = []  # by sequences that ended before their step

    def collect(self, batch: Batch, sampled: Sampled | Exception) -> None:
        """Take a step's outcome into the sequences, and end those that are over.

        What it drew for sequences that ended before it did, and hold no lease any more, is thrown
        away.
        """
        left, self._left = self._left, []
        for lease, event in left:
            self._scheduler.pool.advance(lease, event)
        if isinstance(sampled, Exception):
            self._fail(batch, sampled)
            return
        self._advance(batch, sampled)
        for scoring, found in zip(batch.scoring, sampled.prompt_logprobs, strict=True):
            scoring.sequence.add_prompt_logprobs(
                scoring.positions, [TokenLogprob(*one) for one in found]
            )
        self._accept_all(batch, sampled, trio.current_time())
        for sequence in batch.sequences:
            if sequence.end is not None and sequence.lease is not None:
                self.end(sequence, sequence.end, _BROKEN_LOGITS)

    def interrupt(self, sequence: Sequence, reason: FinishReason) -> None:
        """End a sequence now, or after the step under way that still writes its blocks."""
        if sequence.num_launched:
            sequence.end = sequence.end or reason
        else:
            self.end(sequence, reason)

    def end(self, sequence: Sequence, reason: FinishReason, error: str | None = None) -> None:
        """Post the last event of a sequence that sampled no last token.

        After "stop" the event has the text that was still held back.
        """
        self._forget(sequence, _LEASE_EVENT[reason])
        now = trio.current_time()
        sequence.stamps = msgspec.structs.replace(sequence.stamps, finished_s=now)
        last = sequence.event(
            position=sequence.num_output,
            text=sequence.rest() if reason == "stop" else "",
            prompt_logprobs=sequence.take_prompt_logprobs() if reason == "stop" else (),
            finish_reason=reason,
        )
        if reason == "failed":
            last = msgspec.structs.replace(last, error=error, code=ENGINE_FAILED)
        sequence.mailbox.post(last)
        sequence.mailbox.flush()

    def clear(self) -> None:
        """Forget all without an event; the pool ends the leases."""
        self.sequences.clear()
        self._left.clear()

    def _fail(self, batch: Batch, cause: Exception) -> None:
        error = f"the engine failed while it computed this sequence ({type(cause).__name__})"
        for sequence in batch.sequences:
            if sequence.lease is not None:
                self.end(sequence, sequence.end or "failed", error)
        for sequence in tuple(self.sequences.values()):
            if sequence.end is not None:  # after the step behind, which was withdrawn
                self.end(sequence, sequence.end)

    def _advance(self, batch: Batch, sampled: Sampled) -> None:
        """Count what is computed now, and let others find it."""
        pool, drafts = self._scheduler.pool, batch.drafts
        rows = batch.row_sequences if sampled.broken else []
        broken = {rows[row] for row in sampled.broken}
        for sequence, query_len in zip(batch.sequences, batch.query_lens, strict=True):
            lease = sequence.lease
            if lease is None:
                continue
            num_drafts = len(drafts.get(sequence, ())) if drafts else 0
            sequence.num_computed += query_len - num_drafts
            if sequence not in broken:
                if sequence.num_computed >= (len(lease.path) + 1) * pool.block_size:
                    self._publish(sequence)
                if sequence.state.hold_kv and sequence.num_pending and pool.shape.has_full:
                    self.on_kv_progress(lease, sequence.num_computed // pool.block_size)
            if pool.forgets:
                pool.free_unread(lease, sequence.num_computed)

    def _publish(self, sequence: Sequence) -> None:
        """Blocks that the next step reads already are not exchanged for others that hold the same:
        that waits for the end of a step with none launched after it.
        """
        if not self._scheduler.reuse.publish(sequence, may_swap=not sequence.num_launched):
            self._scheduler.needs_rest = True

    def _accept_all(self, batch: Batch, sampled: Sampled, now: float) -> None:
        for sequence, rows, is_broken in verified(batch, sampled):
            if sequence.end is not None or sequence.lease is None:
                continue
            if self._speculation is not None and sequence in batch.drafts:
                self._speculation.learn(
                    sequence, len(batch.drafts[sequence]), max(0, len(rows) - 1)
                )
            if rows:
                self._accept(sequence, sampled, rows, now)
            if is_broken and sequence.lease is not None:
                sequence.end = "stop" if rows.stop in sampled.exhausted else "failed"

    def _accept(self, sequence: Sequence, sampled: Sampled, rows: range, now: float) -> None:
        """Append sampled tokens: post them, hold the prompt for an export, or end the sequence."""
        position = sequence.num_output
        token_ids = sampled.token_ids[rows.start : rows.stop]
        num_taken, text, reason, stop_reason = sequence.take(token_ids)
        if not position:
            sequence.mark_prefilled(now)
        if reason is not None:
            sequence.stamps = msgspec.structs.replace(sequence.stamps, finished_s=now)
        event = sequence.event(
            position=position,
            token_ids=tuple(token_ids[:num_taken]),
            text=text,
            logprobs=_for_events(sampled, rows[:num_taken]) if sampled.logprobs else (),
            prompt_logprobs=sequence.take_prompt_logprobs(),
            finish_reason=reason,
            stop_reason=stop_reason,
        )
        if reason is not None:
            self._forget(sequence, "finish")
        if sequence.state.hold_kv:
            lease = None if reason is not None else self._hold(sequence)
            sequence.mailbox.post(PrefillDone(first=event, lease=lease))
        else:
            sequence.mailbox.post(event)

    def _hold(self, sequence: Sequence) -> LeaseRef:
        """Keep the blocks of a prompt after its sequence has left, until export or cancel."""
        lease = sequence.lease
        assert lease is not None
        sequence.lease = None
        self._forget(sequence, "finish")
        return self._exchange.hold(lease, sequence.num_computed)

    def _forget(self, sequence: Sequence, event: LeaseEvent) -> None:
        self._scheduler.remove(sequence)
        del self.sequences[sequence.fence]
        if self._speculation is not None:
            self._speculation.forget(sequence)
        if sequence.lease is not None:
            if sequence.num_launched:
                self._left.append((sequence.lease, event))
            else:
                self._scheduler.pool.advance(sequence.lease, event)
            sequence.lease = None


def _for_events(sampled: Sampled, rows: range) -> tuple[TokenLogprob, ...]:
    """The logprobs of rows, as events carry them."""
    return tuple(TokenLogprob(*logprob) for logprob in sampled.logprobs_of(rows))
