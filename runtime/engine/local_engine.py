"""The engine of one replica in this process: continuous batching over one runner and one pool."""

import heapq
from collections.abc import Callable

import trio

from sagellm.graphs.log import get_logger
from sagellm.runtime.engine.batch import Reservation
from sagellm.runtime.engine.input_checks import check_offer, check_sequence, open_sequence
from sagellm.runtime.engine.loop import Collector, Stepping
from sagellm.runtime.engine.mailbox import Mailbox
from sagellm.runtime.engine.prefix_cache import CacheReporter
from sagellm.runtime.engine.runner import EngineResources
from sagellm.runtime.engine.scheduler import Scheduler
from sagellm.runtime.engine.sequence import Sequence
from sagellm.runtime.histograms import Buckets
from sagellm.runtime.kv.lease import Fence, Lease
from sagellm.runtime.kv.pool import BlockPool
from sagellm.runtime.kv.transfer import PoolSource, PoolTarget, PoolTransfers
from sagellm.runtime.kv.transport import BlockLocation, KVChunk
from sagellm.runtime.messages import FinishReason, LeaseRef, SequenceState
from sagellm.runtime.port import (
    NO_DRAFTS,
    EngineHealth,
    EngineLoad,
    EngineRefusal,
    LeaseOffer,
    StaleLease,
)
from sagellm.runtime.prefixes import OnCacheChanged

log = get_logger("sagellm.engine")


class LocalEngine:
    """Implements the engine port. `name` and `replica` are what its leases are called by."""

    def __init__(self, resources: EngineResources, *, name: str, replica: int = 0) -> None:
        self.facts = resources.facts
        self.name = name
        self.replica = replica
        self.pool = BlockPool(
            self.facts.num_blocks,
            self.facts.block_size,
            self._change,
            keeps_prefixes=resources.limits.prefix_caching,
            shape=self.facts.shape,
        )
        self.cache = CacheReporter(self.pool)
        self.scheduler = Scheduler(self.pool, resources.limits)
        self._resources = resources
        self._speculation = resources.speculation
        self._mailboxes: dict[str, Mailbox] = {}
        self._exchange = PoolTransfers(self.pool, resources.storage, engine=name, replica=replica)
        self._collector = Collector(self.scheduler, self._exchange, resources.speculation)
        self._stepping = Stepping(self.scheduler, resources, name=name, replica=replica)
        self._expiries: list[tuple[float, int, Fence]] = []
        self._changed = trio.Event()
        self._at_rest = trio.lowlevel.ParkingLot()
        self.num_early_blocks = 0  # that came while their prompt was being computed
        self._num_arrivals = 0
        self._is_closed = False

    # ---- the port ------------------------------------------------------------------------------

    async def submit(self, state: SequenceState) -> None:
        # Not a turn of the loop for each: what is sent together would wait for many late ones.
        await trio.lowlevel.checkpoint_if_cancelled()
        self._check(state)
        self._num_arrivals += 1
        mailbox = self.events(state.owner)
        sequence = open_sequence(state, self._resources, mailbox, arrival=self._num_arrivals)
        if state.lease is not None:
            sequence.adopt(self._exchange.adopt(state.lease, sequence.fence))
            self.scheduler.reuse.publish(sequence)
        if not self._has_work and not self._stepping.is_computing:
            self._stepping.watchdog.move(trio.current_time())
        self._sequences[sequence.fence] = sequence
        if sequence.num_output >= sequence.max_output:  # resumed behind its last token
            self._collector.end(sequence, "length")
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
        return self._exchange.target(fence) or await self._reserve(fence, offer.num_tokens)

    async def export_chunk(self, lease: LeaseRef, chunk: KVChunk) -> BlockLocation:
        """Where a part of a prompt is that is still being computed. Raises StaleLease."""
        return await self._exchange.share_chunk(lease, chunk)

    async def receive(self, lease: LeaseRef, source: BlockLocation, num_received: int = 0) -> None:
        """Fill a reserved lease from another process, but for the blocks that have landed there
        already. Raises StaleLease, DamagedBlocks.
        """
        await self._exchange.target_of(lease).fetch(source, num_received)

    async def receive_chunk(self, lease: LeaseRef, source: BlockLocation, chunk: KVChunk) -> None:
        """Fill a part of it, while others are computed. Raises StaleLease, DamagedBlocks."""
        await self._exchange.target_of(lease).fetch_chunk(source, chunk)
        self.num_early_blocks += chunk.num_blocks

    def report_kv_progress(self, tell: Callable[[LeaseRef, int], None]) -> None:
        """Call `tell` with the leases of prompts that are to be exported, and with how many of
        their blocks are computed, as that grows.
        """

        def told(lease: Lease, num_blocks: int) -> None:
            tell(lease.ref(self.name, self.replica), num_blocks)

        self._collector.on_kv_progress = told

    def report_cache(self, tell: OnCacheChanged) -> None:
        self.cache.report_to(tell, self.name, self.replica)

    def drop_stale(self) -> None:
        """Let go of what belonged to other processes that are gone."""
        self._resources.storage.drop_stale()

    async def serve_blocks(self) -> None:
        """Let other processes fetch what is exported, until cancelled."""
        await self._resources.storage.serve()

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
            num_steps=self._stepping.num_steps,
            num_prefix_queries=scheduler.reuse.num_queried_tokens,
            num_prefix_hits=scheduler.reuse.num_hit_tokens,
            num_evicted_blocks=pool.num_evicted,
            num_damaged_chunks=self._resources.storage.num_damaged,
            num_early_blocks=self.num_early_blocks,
            drafts=self._speculation.counts if self._speculation else NO_DRAFTS,
        )

    @property
    def health(self) -> EngineHealth:
        return self._stepping.watchdog.health(trio.current_time(), has_work=self._has_work)

    @property
    def step_tokens(self) -> Buckets:
        """How many tokens steps have computed."""
        return self._stepping.step_tokens

    @property
    def _sequences(self) -> dict[Fence, Sequence]:
        return self._collector.sequences

    @property
    def _has_work(self) -> bool:
        """Whether there are sequences whose readers take what is drawn for them."""
        return any(not sequence.mailbox.is_full for sequence in self._sequences.values())

    async def idle(self) -> None:
        while self._stepping.is_computing:
            await self._at_rest.park()

    async def run(self) -> None:
        """Step until cancelled; then no thread is left and every block is free."""
        try:
            await self._resources.runner.open()
            while True:
                await self.step()
        finally:
            with trio.CancelScope(shield=True):
                await self._resources.runner.close()
            self._stop()

    async def step(self) -> None:
        """Schedule, launch, collect, emit; wait for a change where nothing can advance."""
        self._expire()
        batch = self._stepping.next_batch()
        if batch.sequences:
            sampled = await self._stepping.run(batch)
            self._collector.collect(batch, sampled)
            for mailbox in self._mailboxes.values():
                mailbox.flush()
            self.cache.flush()
            if not self._stepping.is_computing:
                self._at_rest.unpark_all()
        else:
            self.cache.flush()
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
            state, vocab_size=self._resources.vocab_size, max_model_len=self.facts.max_model_len
        )
        ref = state.lease
        if ref is not None and ref != self.pool.find(ref).ref(self.name, self.replica):
            raise StaleLease(f"lease {ref.lease_id} is not as {ref} says")

    async def _reserve(self, fence: Fence, num_tokens: int) -> PoolTarget:
        """Wait in line for blocks. Cancelled, it leaves the line, or gives them back."""
        self._num_arrivals += 1
        reservation = Reservation(fence, num_tokens, self._num_arrivals)
        try:
            self.scheduler.reserve(reservation)
            await reservation.granted.wait()
        except BaseException:
            self.scheduler.withdraw(reservation)
            raise
        if reservation.lease is None:
            self._check_open()
        assert reservation.lease is not None
        twin = self._exchange.target(fence)  # of another call that waited for the same
        if twin is not None:
            self.scheduler.withdraw(reservation)
        return twin or self._exchange.open_target(reservation.lease)

    # ---- ends and changes ----------------------------------------------------------------------

    def _interrupt(self, sequence: Sequence, reason: FinishReason) -> None:
        if sequence.num_launched:
            self._stepping.recall()
        self._collector.interrupt(sequence, reason)

    def _expire(self) -> None:
        """End sequences whose answer nobody wants any more."""
        if not self._expiries:
            return
        now = trio.current_time()
        while self._expiries and self._expiries[0][0] <= now:
            _, arrival, fence = heapq.heappop(self._expiries)
            sequence = self._sequences.get(fence)
            if sequence is not None and sequence.arrival == arrival:
                self._interrupt(sequence, "expired")

    async def _wait(self) -> None:
        """Until a change, or the next deadline."""
        self._changed = trio.Event()
        with trio.move_on_at(self._expiries[0][0] if self._expiries else float("inf")):
            await self._changed.wait()

    def _change(self) -> None:
        """A sequence came, blocks became free, or a reader made room."""
        self.scheduler.mark_due()
        if self.scheduler.is_due:
            self._stepping.recall()
        self._changed.set()

    def _make_room(self) -> None:
        """A reader did: until then its sequences could not go on, through no fault of ours."""
        self._stepping.watchdog.move(trio.current_time())
        self._change()

    def _stop(self) -> None:
        """Free every block and end every reader; sequences that were here end with no event."""
        self._is_closed = True
        for reservation in self.scheduler.reservations:
            reservation.granted.set()
        self.scheduler.reservations.clear()
        self.scheduler.running.clear()
        self.scheduler.waiting.clear()
        self.scheduler.adopted.clear()
        self.pool.release_all("crash")
        self._exchange.clear()
        self._collector.clear()
        self._stepping.clear()
        if self._speculation is not None:
            self._speculation.clear()
        for mailbox in self._mailboxes.values():
            mailbox.close()
        self._at_rest.unpark_all()
