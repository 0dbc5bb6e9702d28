"""The engine of one replica in this process: the engine port, over one loop, runner and pool."""

from collections.abc import Callable

import trio

from sagellm.runtime.containers import Buckets
from sagellm.runtime.engine.batch import Reservation
from sagellm.runtime.engine.input_checks import check_offer, check_sequence, open_sequence
from sagellm.runtime.engine.loop import EngineLoop
from sagellm.runtime.engine.output import Mailbox
from sagellm.runtime.engine.prefix_cache import CacheReporter
from sagellm.runtime.engine.runner import EngineResources
from sagellm.runtime.engine.scheduler import Scheduler
from sagellm.runtime.kv.lease import Fence, Lease
from sagellm.runtime.kv.pool import BlockPool
from sagellm.runtime.kv.transfer import PoolSource, PoolTarget, PoolTransfers
from sagellm.runtime.kv.transport import BlockLocation, KVChunk
from sagellm.runtime.messages import LeaseRef, SequenceState
from sagellm.runtime.port import (
    NO_DRAFTS,
    EngineHealth,
    EngineLoad,
    EngineRefusal,
    LeaseOffer,
    StaleLease,
)
from sagellm.runtime.prefixes import OnCacheChanged


class LocalEngine:
    """Implements the engine port. `name` and `replica` identify the engine in references to its
    leases.
    """

    def __init__(self, resources: EngineResources, *, name: str, replica: int = 0) -> None:
        self.facts = resources.facts
        self.name = name
        self.replica = replica
        self.pool = BlockPool(
            self.facts.num_blocks,
            self.facts.block_size,
            self._pool_changed,
            keeps_prefixes=resources.limits.prefix_caching,
            shape=self.facts.shape,
        )
        self.cache = CacheReporter(self.pool)
        self.scheduler = Scheduler(self.pool, resources.limits)
        self.num_early_blocks = 0  # blocks received while their prompt was being computed
        self._resources = resources
        self._exchange = PoolTransfers(self.pool, resources.storage, engine=name, replica=replica)
        self._loop = EngineLoop(
            self.scheduler, self._exchange, self.cache, resources, name=name, replica=replica
        )
        self._num_arrivals = 0
        self._is_closed = False

    # ---- sequences -----------------------------------------------------------------------------

    async def submit(self, state: SequenceState) -> None:
        # A full checkpoint would cost a turn of trio's loop a sequence, so that sequences submitted
        # together would start many turns apart.
        await trio.lowlevel.checkpoint_if_cancelled()
        self._check(state)
        self._num_arrivals += 1
        mailbox = self.events(state.owner)
        sequence = open_sequence(state, self._resources, mailbox, arrival=self._num_arrivals)
        if state.lease is not None:
            sequence.adopt(self._exchange.adopt(state.lease, sequence.fence))
            self.scheduler.reuse.publish(sequence)
        self._loop.add(sequence)

    def cancel(self, request_id: str, choice: int, epoch: int) -> None:
        fence = Fence(request_id, choice, epoch)
        sequence = self._loop.sequences.get(fence)
        if sequence is not None:
            self._loop.interrupt(sequence, "cancelled")
        self._exchange.cancel(fence)

    def events(self, owner: str) -> Mailbox:
        mailbox = self._loop.mailbox(owner)
        if self._is_closed:
            mailbox.close()
        return mailbox

    @property
    def load(self) -> EngineLoad:
        scheduler, pool, speculation = self.scheduler, self.pool, self._resources.speculation
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
            num_steps=self._loop.num_steps,
            num_prefix_queries=scheduler.reuse.num_queried_tokens,
            num_prefix_hits=scheduler.reuse.num_hit_tokens,
            num_evicted_blocks=pool.num_evicted,
            num_damaged_chunks=self._resources.storage.num_damaged,
            num_early_blocks=self.num_early_blocks,
            drafts=speculation.counts if speculation else NO_DRAFTS,
        )

    @property
    def health(self) -> EngineHealth:
        return self._loop.watchdog.health(trio.current_time(), has_work=self._loop.has_work)

    @property
    def step_tokens(self) -> Buckets:
        """A histogram of the tokens of each step."""
        return self._loop.step_tokens

    def _check(self, state: SequenceState) -> None:
        self._check_open()
        if Fence(state.request_id, state.choice, state.epoch) in self._loop.sequences:
            raise EngineRefusal(f"choice {state.choice} of {state.request_id} runs here already")
        check_sequence(
            state, vocab_size=self._resources.vocab_size, max_model_len=self.facts.max_model_len
        )
        if state.sampling.grammar is not None and self._resources.grammars is None:
            raise EngineRefusal(f"engine {self.name} binds no answer to a grammar; ask for none")
        ref = state.lease
        if ref is not None and ref != self.pool.find(ref).ref(self.name, self.replica):
            raise StaleLease(f"lease {ref.lease_id} is not as {ref} says")

    def _check_open(self) -> None:
        if self._is_closed:
            raise EngineRefusal(f"engine {self.name} has stopped", "shutting_down")

    # ---- KV blocks -----------------------------------------------------------------------------

    def export(self, lease: LeaseRef) -> PoolSource:
        return self._exchange.export(lease)

    async def import_(self, offer: LeaseOffer) -> PoolTarget:
        await trio.lowlevel.checkpoint()
        self._check_open()
        check_offer(offer, self.facts)
        fence = Fence(offer.request_id, offer.choice, offer.epoch)
        return self._exchange.target(fence) or await self._reserve(fence, offer.num_tokens)

    async def _reserve(self, fence: Fence, num_tokens: int) -> PoolTarget:
        """Wait for blocks in order of arrival, and reserve them. A cancellation withdraws the
        reservation, or frees its blocks.
        """
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
        # Another call may have waited for the same blocks, and got them first.
        earlier = self._exchange.target(fence)
        if earlier is not None:
            self.scheduler.withdraw(reservation)
        return earlier or self._exchange.open_target(reservation.lease)

    async def export_chunk(self, lease: LeaseRef, chunk: KVChunk) -> BlockLocation:
        """Offer a computed chunk of a prompt that is still being computed. Return the location of
        its blocks. Raises StaleLease.
        """
        return await self._exchange.share_chunk(lease, chunk)

    async def receive(self, lease: LeaseRef, source: BlockLocation, num_received: int = 0) -> None:
        """Copy the blocks of another process into a reserved lease, except the first `num_received`
        blocks, which it has already. Raises StaleLease, DamagedBlocks.
        """
        await self._exchange.target_of(lease).fetch(source, num_received)

    async def receive_chunk(self, lease: LeaseRef, source: BlockLocation, chunk: KVChunk) -> None:
        """Copy a chunk of a prompt into a reserved lease, while later chunks are computed. Raises
        StaleLease, DamagedBlocks.
        """
        await self._exchange.target_of(lease).fetch_chunk(source, chunk)
        self.num_early_blocks += chunk.num_blocks

    def report_kv_progress(self, report: Callable[[LeaseRef, int], None]) -> None:
        """Call `report` with the lease of a prompt that is to be exported, and with its number of
        computed blocks, whenever the number has grown.
        """

        def on_kv_progress(lease: Lease, num_blocks: int) -> None:
            report(lease.ref(self.name, self.replica), num_blocks)

        self.scheduler.on_kv_progress = on_kv_progress

    def report_cache(self, tell: OnCacheChanged) -> None:
        self.cache.report_to(tell, self.name, self.replica)

    def drop_stale(self) -> None:
        """Free resources of other processes that are gone."""
        self._resources.storage.drop_stale()

    async def serve_blocks(self) -> None:
        """Serve exported blocks to other processes, until cancelled."""
        await self._resources.storage.serve()

    # ---- running -------------------------------------------------------------------------------

    async def idle(self) -> None:
        await self._loop.idle()

    async def run(self) -> None:
        """Step until cancelled. Afterwards no thread is left, and every block is free."""
        try:
            await self._resources.runner.open()
            self._loop.grammars.open_when_idle()
            while True:
                await self._loop.step()
        finally:
            with trio.CancelScope(shield=True):
                await self._resources.runner.close()
                await self._loop.grammars.close()
            self._stop()

    def _pool_changed(self) -> None:
        self._loop.notify()

    def _stop(self) -> None:
        """Free every block and end every reader. Open sequences end without an event."""
        self._is_closed = True
        for reservation in self.scheduler.reservations:
            reservation.granted.set()
        self.scheduler.reservations.clear()
        self.scheduler.running.clear()
        self.scheduler.waiting.clear()
        self.scheduler.adopted.clear()
        self.pool.release_all("crash")
        self._exchange.clear()
        self._loop.clear()
