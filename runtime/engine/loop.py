"""The engine's loop: schedule, launch, collect, emit."""

import heapq
from contextlib import suppress

import msgspec
import trio

from sagellm.backends import Sampled
from sagellm.graphs.log import get_logger
from sagellm.runtime.containers import Buckets
from sagellm.runtime.engine.batch import Batch
from sagellm.runtime.engine.grammar_queue import GrammarQueue, Outcome, Refusal
from sagellm.runtime.engine.output import Mailbox
from sagellm.runtime.engine.prefix_cache import CacheReporter
from sagellm.runtime.engine.runner import EngineResources, StepLaunch, Watchdog
from sagellm.runtime.engine.scheduler import Scheduler
from sagellm.runtime.engine.sequence import UNSTARTED, Sequence
from sagellm.runtime.engine.speculation import verified
from sagellm.runtime.kv.lease import EVENT_AT_END, Fence, Lease, LeaseEvent
from sagellm.runtime.kv.transfer import PoolTransfers
from sagellm.runtime.messages import ENGINE_FAILED, FinishReason, LeaseRef, Stamps, TokenLogprob
from sagellm.runtime.port import PrefillDone

log = get_logger("sagellm.engine")

STEP_TOKENS = (1, *(8 << power for power in range(12)))  # 8 ... 16384, the buckets of vLLM

_BROKEN_LOGITS = "its logits are not finite; the weights or their dtype are wrong"
_CODE: dict[FinishReason, str] = {"failed": ENGINE_FAILED, "refused": "invalid_grammar"}


class EngineLoop:
    """Steps one engine with async scheduling: as in vLLM, the next step is scheduled and launched
    before the current step has sampled.

    The loop keeps each sequence until the sequence ends. Blocks that a launched step writes stay
    leased until the step is collected, even if their sequence ends earlier.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        exchange: PoolTransfers,
        cache: CacheReporter,
        resources: EngineResources,
        *,
        name: str,
        replica: int,
    ) -> None:
        self.sequences: dict[Fence, Sequence] = {}
        self.mailboxes: dict[str, Mailbox] = {}  # by owner
        self.watchdog = Watchdog()
        self.num_steps = 0
        self.step_tokens = Buckets(STEP_TOKENS)  # computed in one step
        self._scheduler = scheduler
        self._exchange = exchange
        self._cache = cache
        self._resources = resources
        self._speculation = resources.speculation
        self.grammars = GrammarQueue(resources.grammars, self.sequences, self._compiled)
        self._name = name
        self._replica = replica
        self._launched: StepLaunch | None = None  # computes, or is the next to compute
        self._next: StepLaunch | None = None  # begins when `_launched` has sampled
        self._orphaned: list[tuple[Lease, LeaseEvent]] = []  # of sequences that ended mid-step
        self._expiries: list[tuple[float, int, Fence]] = []
        self._changed = trio.Event()
        self._idle = trio.lowlevel.ParkingLot()

    async def step(self) -> None:
        """Schedule, launch, collect, emit; or wait for a change if no sequence can advance."""
        self._expire()
        # With async scheduling, the previous step has launched this batch already.
        batch = self._launched.batch if self._launched else self._scheduler.schedule()
        if not batch.sequences:
            self._cache.flush()
            await self._wait()
            return
        sampled = await self._launch(batch)
        self._collect(batch, sampled)
        self._emit()

    # ---- between steps ---------------------------------------------------------------------------

    @property
    def has_work(self) -> bool:
        """Whether some sequence can advance: its mailbox has room, and its grammar is compiled."""
        return any(
            not sequence.mailbox.is_full and (sequence.matcher or not sequence.sampling.grammar)
            for sequence in self.sequences.values()
        )

    def mailbox(self, owner: str) -> Mailbox:
        """Return the mailbox of `owner`, and create it at the first call."""
        if owner not in self.mailboxes:
            self.mailboxes[owner] = Mailbox(self._reader_made_room)
        return self.mailboxes[owner]

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence. A sequence that was resumed after its last token ends at once."""
        self._reset_if_idle()
        self.sequences[sequence.fence] = sequence
        if sequence.num_output >= sequence.max_output:
            self._end(sequence, "length")
            return
        expires_s = sequence.state.expires_s
        if expires_s is not None:
            heapq.heappush(self._expiries, (expires_s, sequence.arrival, sequence.fence))
        if sequence.sampling.grammar is None:
            self._scheduler.add(sequence)
            self.notify()
        else:
            self.grammars.put(sequence)
            self._changed.set()  # an idle loop must wait for the new deadline

    def _compiled(self, sequence: Sequence, outcome: Outcome) -> None:
        """Schedule a sequence whose grammar is compiled, or end it."""
        if isinstance(outcome, Refusal):
            self._end(sequence, *outcome)
            return
        self._reset_if_idle()
        sequence.matcher = outcome
        self._scheduler.add(sequence)
        self.notify()

    def interrupt(self, sequence: Sequence, reason: FinishReason) -> None:
        """End a sequence now, or after the launched step if that step still writes its blocks."""
        if sequence.num_launched:
            self._cancel_next()
        if sequence.num_launched:  # some launched step was not cancelled
            sequence.forced_end = sequence.forced_end or reason
        else:
            self._end(sequence, reason)

    def notify(self) -> None:
        """Have the next step scheduled anew: a sequence came, blocks became free, or a
        reader read.
        """
        self._scheduler.mark_due()
        if self._scheduler.is_due:
            self._cancel_next()
        self._changed.set()

    async def idle(self) -> None:
        """Wait until no step computes."""
        while self._launched is not None:
            await self._idle.park()

    def clear(self) -> None:
        """Forget every sequence without posting an event, and close every mailbox. The caller has
        closed the runner, and ends the leases in the pool.
        """
        self.sequences.clear()
        self._orphaned.clear()
        self._launched = self._next = None
        if self._speculation is not None:
            self._speculation.clear()
        for mailbox in self.mailboxes.values():
            mailbox.close()
        self._idle.unpark_all()

    def _reset_if_idle(self) -> None:
        if self._launched is None and not self.has_work:
            self.watchdog.reset(trio.current_time())

    def _reader_made_room(self) -> None:
        # Sequences could not advance while the mailbox was full: the engine did not hang.
        self.watchdog.reset(trio.current_time())
        self.notify()

    def _expire(self) -> None:
        """End sequences that have passed their deadline."""
        if not self._expiries:
            return
        now = trio.current_time()
        while self._expiries and self._expiries[0][0] <= now:
            _, arrival, fence = heapq.heappop(self._expiries)
            sequence = self.sequences.get(fence)
            # Another sequence may have the same fence by now.
            if sequence is not None and sequence.arrival == arrival:
                self.interrupt(sequence, "expired")

    async def _wait(self) -> None:
        """Wait for a change, or for the next deadline."""
        self._changed = trio.Event()
        with trio.move_on_at(self._expiries[0][0] if self._expiries else float("inf")):
            await self._changed.wait()

    # ---- launch --------------------------------------------------------------------------------

    async def _launch(self, batch: Batch) -> Sampled | Exception:
        """Launch a batch, unless it is launched already, and the next batch. Wait until the first
        batch has sampled, and return its tokens, or the exception of a failed step.

        The blocks of the batch stay leased until this method returns.
        """
        now = trio.current_time()
        for sequence in batch.sequences:
            if sequence.stamps is UNSTARTED:
                sequence.stamps = Stamps(started_s=now)
        self.num_steps += 1
        self.watchdog.start_step(now)
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
            self.watchdog.finish_step(trio.current_time())

    async def _run(self, batch: Batch) -> Sampled:
        speculation = self._speculation
        if speculation is not None:
            await speculation.extend(batch, self._scheduler)
        self.step_tokens.observe(batch.num_tokens)
        if self._launched is None:
            self._launched = self._resources.runner.launch(batch)
        try:
            self._launch_next(self._launched)
        except Exception:
            await self._launched.result()  # the launched step still writes blocks
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

    def _cancel_next(self) -> None:
        """Cancel the next step unless it has begun: its schedule is out of date."""
        if self._next is not None and self._next.cancel():
            self._scheduler.unschedule(self._next.batch)
            self._next = None

    async def _drop_next(self) -> None:
        """Cancel the step launched after a failed step, or wait until it ends and drop its
        tokens.
        """
        self._cancel_next()
        if self._next is not None:
            with suppress(Exception):
                await self._next.result()
            batch, self._next = self._next.batch, None
            self._scheduler.unschedule(batch, has_begun=True)

    # ---- collect -------------------------------------------------------------------------------

    def _collect(self, batch: Batch, sampled: Sampled | Exception) -> None:
        """Update sequences with the outcome of their step, and end sequences that are done.

        A sequence that ended during the step has no lease any more; its sampled tokens are dropped.
        """
        orphaned, self._orphaned = self._orphaned, []
        for lease, event in orphaned:
            self._scheduler.pool.advance(lease, event)
        if isinstance(sampled, Exception):
            self._fail(batch, sampled)
            return
        self._scheduler.update(batch, sampled.broken)
        for scoring, found in zip(batch.scoring, sampled.prompt_logprobs, strict=True):
            logprobs = [TokenLogprob(*one) for one in found]
            scoring.sequence.add_prompt_logprobs(scoring.positions, logprobs)
        self._accept(batch, sampled, trio.current_time())
        for sequence in batch.sequences:
            if sequence.forced_end is not None and sequence.lease is not None:
                self._end(sequence, sequence.forced_end)

    def _fail(self, batch: Batch, cause: Exception) -> None:
        """End the sequences of a step that failed with `cause`."""
        error = f"the engine failed while it computed this sequence ({type(cause).__name__})"
        for sequence in batch.sequences:
            if sequence.lease is not None:
                self._end(sequence, sequence.forced_end or "failed", error)
        for sequence in tuple(self.sequences.values()):
            # These were to end after the next step, which was dropped.
            if sequence.forced_end is not None:
                self._end(sequence, sequence.forced_end)

    def _accept(self, batch: Batch, sampled: Sampled, now: float) -> None:
        """Append sampled tokens and post them; end sequences, or hold blocks for an export."""
        for sequence, rows, is_broken in verified(batch, sampled):
            if sequence.forced_end is not None or sequence.lease is None:
                continue
            if self._speculation is not None and sequence in batch.drafts:
                num_right = max(0, len(rows) - 1)
                self._speculation.learn(sequence, len(batch.drafts[sequence]), num_right)
            if rows:
                event = sequence.accept(sampled, rows, now)
                if event.is_last:
                    self._forget(sequence, "finish")
                if sequence.state.hold_kv:
                    lease = None if event.is_last else self._hold(sequence)
                    sequence.mailbox.post(PrefillDone(first=event, lease=lease))
                else:
                    sequence.mailbox.post(event)
            if is_broken and sequence.lease is not None:
                self._end_broken(sequence, sampled, rows.stop)

    def _end_broken(self, sequence: Sequence, sampled: Sampled, row: int) -> None:
        """End a sequence whose next row has no valid token."""
        if row in sampled.exhausted:
            self._end(sequence, "stop")
        elif row in sampled.refused:
            self._end(sequence, "refused", sampled.refused[row])
        else:
            self._end(sequence, "failed", _BROKEN_LOGITS)

    def _hold(self, sequence: Sequence) -> LeaseRef:
        """Forget a sequence, but keep the lease of its prompt until an export or a cancel."""
        lease = sequence.lease
        assert lease is not None
        sequence.lease = None
        self._forget(sequence, "finish")
        return self._exchange.hold(lease, sequence.num_computed)

    # ---- emit ----------------------------------------------------------------------------------

    def _emit(self) -> None:
        """Give each reader the events of the step as one batch, and report the prefix cache."""
        for mailbox in self.mailboxes.values():
            mailbox.flush()
        self._cache.flush()
        if self._launched is None:
            self._idle.unpark_all()

    def _end(self, sequence: Sequence, reason: FinishReason, error: str | None = None) -> None:
        """Forget a sequence, and post its last event, which has no token."""
        self._forget(sequence, EVENT_AT_END[reason])
        last = sequence.last_event(trio.current_time(), reason)
        if reason in _CODE:
            last = msgspec.structs.replace(last, error=error, code=_CODE[reason])
        sequence.mailbox.post(last)
        sequence.mailbox.flush()

    def _forget(self, sequence: Sequence, event: LeaseEvent) -> None:
        """Drop a sequence and end its lease, after the launched step if that still writes its
        blocks.
        """
        self._scheduler.remove(sequence)
        del self.sequences[sequence.fence]
        if self._speculation is not None:
            self._speculation.forget(sequence)
        if sequence.lease is not None:
            if sequence.num_launched:
                self._orphaned.append((sequence.lease, event))
            else:
                self._scheduler.pool.advance(sequence.lease, event)
            sequence.lease = None
