"""The engine of one replica in this process: continuous batching over one runner and one pool."""

import heapq

import msgspec
import structlog
import trio

from sagellm.runtime.buckets import Buckets
from sagellm.runtime.engine.batch import Batch, Landing
from sagellm.runtime.engine.equipment import Equipment
from sagellm.runtime.engine.intake import check_offer, check_sequence
from sagellm.runtime.engine.mailbox import Mailbox
from sagellm.runtime.engine.port import (
    EngineHealth,
    EngineLoad,
    EngineRefusal,
    LeaseOffer,
    PrefillDone,
    StaleLease,
)
from sagellm.runtime.engine.pulse import Pulse
from sagellm.runtime.engine.runner import Drawn
from sagellm.runtime.engine.scheduler import Scheduler
from sagellm.runtime.engine.sequence import UNSTARTED, Sequence
from sagellm.runtime.kv.exchange import Exchange
from sagellm.runtime.kv.lease import Fence, LeaseEvent
from sagellm.runtime.kv.pool import BlockPool
from sagellm.runtime.kv.transfer import PoolSource, PoolTarget
from sagellm.runtime.messages import (
    FinishReason,
    LeaseRef,
    SequenceState,
    Stamps,
    TokenLogprob,
)

log = structlog.get_logger("sagellm.engine")

STEP_TOKENS = (1, *(8 << power for power in range(12)))  # 8 ... 16384, the buckets of vLLM

_BROKEN = "its logits are not finite; the weights or their dtype are wrong"
_LEASE_EVENT: dict[FinishReason, LeaseEvent] = {
    "stop": "finish",
    "length": "finish",
    "cancelled": "cancel",
    "expired": "expire",
    "refused": "refuse",
    "failed": "crash",
}


class LocalEngine:
    """Implements the engine port. `name` and `replica` are what its leases are called by."""

    def __init__(self, equipment: Equipment, *, name: str, replica: int = 0) -> None:
        self.facts = equipment.facts
        self.name = name
        self.replica = replica
        self.pool = BlockPool(self.facts.num_blocks, self.facts.block_size, self._change)
        self.scheduler = Scheduler(self.pool, equipment.limits)
        self._equipment = equipment
        self._mailboxes: dict[str, Mailbox] = {}
        self._sequences: dict[Fence, Sequence] = {}
        self._exchange = Exchange(self.pool, equipment.storage, engine=name, replica=replica)
        self._expiries: list[tuple[float, int, Fence]] = []
        self._launched: Batch | None = None
        self._changed = trio.Event()
        self._pulse = Pulse()
        self._num_arrivals = 0
        self._num_steps = 0
        self.step_tokens = Buckets(STEP_TOKENS)  # computed in one step
        self._is_closed = False

    # ---- the port ------------------------------------------------------------------------------

    async def submit(self, state: SequenceState) -> None:
        await trio.lowlevel.checkpoint()
        self._check(state)
        sequence = self._sequence(state)
        if state.lease is not None:
            sequence.adopt(self._exchange.adopt(state.lease, sequence.fence))
        if not self._has_work and self._launched is None:
            self._pulse.move(trio.current_time())
        self._sequences[sequence.fence] = sequence
        if sequence.num_output >= sequence.max_output:  # resumed behind its last token
            self._end(sequence, "length")
            return
        if state.expires_s is not None:
            heapq.heappush(self._expiries, (state.expires_s, sequence.arrival, sequence.fence))
        self.scheduler.add(sequence)
        self._change()

    def cancel(self, request_id: str, choice: int, epoch: int) -> None:
        fence = Fence(request_id, choice, epoch)
        if fence in self._sequences:
            self._interrupt(self._sequences[fence], "cancelled")
        self._exchange.cancel(fence)

    def export(self, lease: LeaseRef) -> PoolSource:
        return self._exchange.export(lease)

    async def import_(self, offer: LeaseOffer) -> PoolTarget:
        await trio.lowlevel.checkpoint()
        self._check_open()
        check_offer(offer, self.facts)
        fence = Fence(offer.request_id, offer.choice, offer.epoch)
        return self._exchange.target(fence) or await self._land(fence, offer.num_tokens)

    def events(self, owner: str) -> Mailbox:
        if owner not in self._mailboxes:
            self._mailboxes[owner] = Mailbox(self._make_room)
        if self._is_closed:
            self._mailboxes[owner].close()
        return self._mailboxes[owner]

    @property
    def load(self) -> EngineLoad:
        scheduler, pool = self.scheduler, self.pool
        return EngineLoad(
            num_running=len(scheduler.running),
            num_waiting=scheduler.num_waiting,
            num_pending_prefill_tokens=scheduler.num_pending_prefill_tokens,
            num_free_blocks=pool.num_free,
            num_cached_blocks=pool.num_cached,
            num_leased_blocks=pool.num_leased,
            num_blocks=pool.num_blocks,
            peak_leased_blocks=pool.peak_leased,
            num_preemptions=scheduler.num_preemptions,
            num_steps=self._num_steps,
        )

    @property
    def health(self) -> EngineHealth:
        return self._pulse.health(trio.current_time(), has_work=self._has_work)

    @property
    def _has_work(self) -> bool:
        """Whether there are sequences whose readers take what is drawn for them."""
        return any(not sequence.mailbox.is_full for sequence in self._sequences.values())

    async def run(self) -> None:
        """Step until cancelled; then no thread is left and every block is free."""
        try:
            await self._equipment.runner.open()
            while True:
                await self.step()
        finally:
            with trio.CancelScope(shield=True):
                await self._equipment.runner.close()
            self._stop()

    async def step(self) -> None:
        """Schedule, launch, collect, emit; wait for a change where nothing can advance."""
        self._expire()
        batch = self.scheduler.schedule()
        if batch.sequences:
            drawn = await self._launch(batch)
            self._collect(batch, drawn)
            self._emit()
        else:
            await self._wait()

    # ---- taking sequences ----------------------------------------------------------------------

    def _check_open(self) -> None:
        if self._is_closed:
            raise EngineRefusal(f"engine {self.name} has stopped", "shutting_down")

    def _check(self, state: SequenceState) -> None:
        self._check_open()
        if Fence(state.request_id, state.choice, state.epoch) in self._sequences:
            raise EngineRefusal(f"choice {state.choice} of {state.request_id} runs here already")
        check_sequence(
            state, vocab_size=self._equipment.vocab_size, max_model_len=self.facts.max_model_len
        )
        ref = state.lease
        if ref is not None and ref != self.pool.find(ref).ref(self.name, self.replica):
            raise StaleLease(f"lease {ref.lease_id} is not as {ref} says")

    def _sequence(self, state: SequenceState) -> Sequence:
        self._num_arrivals += 1
        sampling, num_prompt = state.sampling, len(state.prompt_token_ids)
        eos = frozenset() if sampling.ignore_eos else self._equipment.eos_token_ids
        open_transcript = self._equipment.open_transcript
        return Sequence(
            state,
            arrival=self._num_arrivals,
            mailbox=self.events(state.owner),
            max_output=min(sampling.max_tokens, self.facts.max_model_len - num_prompt),
            stop_ids=eos.union(sampling.stop_token_ids),
            transcript=open_transcript(state) if open_transcript else None,
        )

    async def _land(self, fence: Fence, num_tokens: int) -> PoolTarget:
        """Wait in line for blocks. Cancelled, it leaves the line, or gives them back."""
        self._num_arrivals += 1
        landing = Landing(fence, num_tokens, self._num_arrivals)
        try:
            self.scheduler.land(landing)
            await landing.granted.wait()
        except BaseException:
            self.scheduler.leave(landing)
            raise
        if landing.lease is None:
            self._check_open()
        assert landing.lease is not None
        twin = self._exchange.target(fence)  # of another call that waited for the same
        if twin is not None:
            self.scheduler.leave(landing)
        return twin or self._exchange.open_target(landing.lease)

    # ---- one step ------------------------------------------------------------------------------

    async def _launch(self, batch: Batch) -> Drawn | Exception:
        """Compute and draw; the batch's blocks stay leased until this returns."""
        now = trio.current_time()
        for sequence in batch.sequences:
            if sequence.stamps is UNSTARTED:
                sequence.stamps = Stamps(started_s=now)
        self._launched = batch
        self._num_steps += 1
        self.step_tokens.observe(batch.num_tokens)
        self._pulse.start(now)
        try:
            return await self._equipment.runner.run(batch)
        except Exception as error:
            log.error("step_failed", engine=self.name, replica=self.replica, exc_info=error)
            return error
        finally:
            self._launched = None
            self._pulse.finish(trio.current_time())

    def _collect(self, batch: Batch, drawn: Drawn | Exception) -> None:
        """Take the step's results into the sequences, and end those that are over."""
        if isinstance(drawn, Exception):
            error = f"the engine failed while it computed this sequence ({type(drawn).__name__})"
            for sequence in batch.sequences:
                self._end(sequence, sequence.end or "failed", error)
            return
        for sequence, query_len in zip(batch.sequences, batch.query_lens, strict=True):
            sequence.num_computed += query_len
        for scoring, found in zip(batch.scoring, drawn.prompt_logprobs, strict=True):
            scoring.sequence.take_scores(scoring.positions, found)
        self._accept_all(batch, drawn, trio.current_time())
        for sequence in batch.sequences:
            if sequence.end is not None:
                self._end(sequence, sequence.end, _BROKEN)

    def _accept_all(self, batch: Batch, drawn: Drawn, now: float) -> None:
        logprobs = drawn.logprobs or [None] * len(drawn.token_ids)
        rows = zip(batch.drawing, drawn.token_ids, logprobs, strict=True)
        for row, (sequence, token_id, logprob) in enumerate(rows):
            if sequence.end is None and row in drawn.broken:
                sequence.end = "failed"
            elif sequence.end is None:
                self._accept(sequence, token_id, logprob, now)

    def _accept(
        self, sequence: Sequence, token_id: int, logprob: TokenLogprob | None, now: float
    ) -> None:
        """Append one drawn token: post it, hold the prompt for an export, or end the sequence."""
        position = sequence.num_output
        sequence.tokens.append(token_id)
        sequence.mark_prefilled(now)
        text, reason, stop_reason = sequence.judge(token_id)
        if reason is not None:
            sequence.stamps = msgspec.structs.replace(sequence.stamps, finished_s=now)
        event = sequence.event(
            position=position,
            token_ids=(token_id,),
            text=text,
            logprobs=(logprob,) if logprob else (),
            prompt_logprobs=sequence.give_scores(),
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

    def _emit(self) -> None:
        for mailbox in self._mailboxes.values():
            mailbox.flush()

    # ---- ends ----------------------------------------------------------------------------------

    def _interrupt(self, sequence: Sequence, reason: FinishReason) -> None:
        """End a sequence now, or after the launched step, which still writes its blocks."""
        if self._launched is not None and sequence in self._launched.sequences:
            sequence.end = sequence.end or reason
        else:
            self._end(sequence, reason)

    def _end(self, sequence: Sequence, reason: FinishReason, error: str | None = None) -> None:
        """The last event of a sequence that drew no last token."""
        self._forget(sequence, _LEASE_EVENT[reason])
        now = trio.current_time()
        sequence.stamps = msgspec.structs.replace(sequence.stamps, finished_s=now)
        sequence.mailbox.post(
            sequence.event(
                position=sequence.num_output,
                finish_reason=reason,
                error=error if reason == "failed" else None,
            )
        )
        sequence.mailbox.flush()

    def _forget(self, sequence: Sequence, event: LeaseEvent) -> None:
        self.scheduler.remove(sequence)
        del self._sequences[sequence.fence]
        if sequence.lease is not None:
            self.pool.advance(sequence.lease, event)
            sequence.lease = None

    def _expire(self) -> None:
        """End sequences whose answer nobody wants any more."""
        now = trio.current_time()
        while self._expiries and self._expiries[0][0] <= now:
            _, arrival, fence = heapq.heappop(self._expiries)
            sequence = self._sequences.get(fence)
            if sequence is not None and sequence.arrival == arrival:
                self._end(sequence, "expired")

    async def _wait(self) -> None:
        """Until a change, or the next deadline."""
        self._changed = trio.Event()
        with trio.move_on_at(self._expiries[0][0] if self._expiries else float("inf")):
            await self._changed.wait()

    def _change(self) -> None:
        """A sequence came, blocks became free, or a reader made room."""
        self._changed.set()

    def _make_room(self) -> None:
        """A reader did: until then its sequences could not go on, through no fault of ours."""
        self._pulse.move(trio.current_time())
        self._change()

    def _stop(self) -> None:
        """Free every block and end every reader; sequences that were here end with no event."""
        self._is_closed = True
        for landing in self.scheduler.landings:
            landing.granted.set()
        self.scheduler.landings.clear()
        self.scheduler.running.clear()
        self.scheduler.waiting.clear()
        self.scheduler.adopted.clear()
        self.pool.release_all("crash")
        self._exchange.clear()
        self._sequences.clear()
        for mailbox in self._mailboxes.values():
            mailbox.close()
