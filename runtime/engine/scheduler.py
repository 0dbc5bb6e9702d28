"""The scheduler: admits and preempts sequences, and chooses the sequences of the next step."""

from bisect import insort
from collections import deque
from collections.abc import Callable, Collection

from sagellm.runtime.engine.batch import Batch, Reservation, TokenBudget
from sagellm.runtime.engine.options import Limits
from sagellm.runtime.engine.prefix_cache import PrefixReuse
from sagellm.runtime.engine.sequence import Sequence
from sagellm.runtime.kv.lease import Lease
from sagellm.runtime.kv.pool import BlockPool


class Scheduler:
    """Continuous batching over one block pool, after vLLM's V1 scheduler.

    Each step first serves running decodes, then prefills in chunks. Sequences join and leave at
    every step. A prompt reserves all its blocks when it is admitted, so only decodes run out of
    blocks. Then the running sequence last in rank (priority, arrival) is preempted, and recomputed
    later. The first in rank is never preempted for another sequence, and the pool can hold the
    longest sequence, so some sequence always advances.

    Blocks that become free go to waiting sequences and reservations in order of arrival. A sequence
    that adopted a reservation has its blocks, and waits only for a slot. `reuse` finds the blocks
    of a prompt that another sequence has computed, or computes in this step. Such blocks are not
    computed again.

    `on_kv_progress` is called after each step of a prompt that is to be exported, except the last
    step. It gets the prompt's lease and its number of computed blocks of full attention.
    """

    def __init__(self, pool: BlockPool, limits: Limits) -> None:
        self.pool = pool
        self.limits = limits
        self.reuse = PrefixReuse(pool)
        self.running: list[Sequence] = []
        self.waiting: list[Sequence] = []  # in rank order
        self.adopted: deque[Sequence] = deque()
        self.reservations: deque[Reservation] = deque()
        self.num_preemptions = 0
        self.is_due = False  # whether waiting sequences may advance since the last schedule
        self.on_kv_progress: Callable[[Lease, int], None] = lambda lease, num_blocks: None
        self._needs_idle = False  # equal blocks wait to be merged while no step computes
        self._starved: int | None = None  # the arrival of the sequence that waits for blocks
        # Keeps decodes from running dry right after an admission; vLLM's watermark of one per cent.
        self._watermark = pool.num_blocks // 100
        self._max_chunk = limits.max_chunk
        self._keeps_states = pool.shape.num_state_blocks > 0 and pool.keeps_prefixes
        self._budget = TokenBudget(limits, pool.block_size if self._keeps_states else None)

    @property
    def num_waiting(self) -> int:
        return len(self.waiting) + len(self.adopted)

    @property
    def num_pending_prefill_tokens(self) -> int:
        """Pending tokens of waiting and running prompts, less the cached prefixes found so far."""
        total = 0
        for sequence in self.running:
            pending = sequence.num_pending
            total += pending if pending > 1 else 0
        for sequence in self.waiting:
            total += sequence.num_pending - len(sequence.cached_prefix) * self.pool.block_size
        return total

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence. A sequence with a lease waits only for a slot."""
        if sequence.lease is None:
            self.reuse.find(sequence)
            insort(self.waiting, sequence, key=lambda waiting: waiting.rank)
        else:
            self.adopted.append(sequence)

    def mark_due(self) -> None:
        """Note that waiting sequences may advance: one came, or blocks or a slot became free."""
        has_slot = (self.waiting or self.adopted) and self._num_slots > 0
        if has_slot or self.reservations:
            self.is_due = True

    def remove(self, sequence: Sequence) -> None:
        """Take a sequence out of its queue. The caller ends its lease."""
        for queue in (self.running, self.waiting, self.adopted):
            if sequence in queue:
                queue.remove(sequence)
                self.mark_due()
                return

    @property
    def _num_slots(self) -> int:
        """Sequences that may start. A sequence that ends with a launched step takes no slot."""
        return self.limits.max_num_seqs - sum(not running.is_ending for running in self.running)

    def schedule(self) -> Batch:
        """Schedule the next step and reserve its blocks. Empty if no sequence can advance."""
        self._needs_idle = False
        return self._schedule()

    def schedule_next(self) -> Batch:
        """Schedule the step after the launched steps before they have sampled, as if no answer
        ended with their tokens. Tokens computed for an answer that does end are dropped.

        The batch is also empty if the outcome of launched steps decides who computes next: a
        sequence needs a block that only a preemption frees, a mailbox has room for the events of
        one step alone, or equal blocks wait to be merged, which needs a moment when no step
        computes.
        """
        is_narrow = any(sequence.mailbox.num_free == 1 for sequence in self.running)
        num_blocks_missing = sum(map(self._num_lacking, (*self.running, *self.adopted)))
        if self._needs_idle or is_narrow or num_blocks_missing > self.pool.num_available:
            return Batch()
        return self._schedule()

    def unschedule(self, batch: Batch, *, has_begun: bool = False) -> None:
        """Make the tokens of a batch from `schedule_next` pending again: the batch was cancelled,
        or computed after a failed step. Sequences that the batch admitted keep their blocks.

        A batch that `has_begun` may have overwritten recurrent states, which cannot go back. Its
        sequences are then preempted, except sequences of the failed step, which end anyway.
        """
        batch.end()
        self._budget.undo()
        if has_begun and self.pool.shape.num_state_blocks:
            for sequence, start in zip(batch.sequences, batch.starts, strict=True):
                lease = sequence.lease
                if lease is None or sequence.num_launched:
                    continue
                if lease.state_at(start) is lease.state_blocks:
                    self._preempt(sequence)

    def update(self, batch: Batch, broken_rows: Collection[int]) -> None:
        """Count the tokens of a computed batch, publish blocks that are full, and free blocks that
        no window needs any more. `broken_rows`: rows whose logits are not finite; the blocks of
        their sequences are not published.
        """
        pool, drafts = self.pool, batch.drafts
        rows = batch.row_sequences if broken_rows else []
        broken = {rows[row] for row in broken_rows}
        for sequence, query_len in zip(batch.sequences, batch.query_lens, strict=True):
            lease = sequence.lease
            if lease is None:
                continue
            num_drafts = len(drafts.get(sequence, ())) if drafts else 0
            sequence.num_computed += query_len - num_drafts
            if sequence not in broken:
                if sequence.num_computed >= (len(lease.path) + 1) * pool.block_size:
                    # Blocks that the next step reads already are not swapped for equal published
                    # blocks: the swap waits for a step that ends with no other step launched.
                    may_swap = not sequence.num_launched
                    if not self.reuse.publish(sequence, may_swap=may_swap):
                        self._needs_idle = True
                if sequence.state.hold_kv and sequence.num_pending and pool.shape.has_full:
                    self.on_kv_progress(lease, sequence.num_computed // pool.block_size)
            if pool.forgets:
                pool.free_unread(lease, sequence.num_computed)

    def _schedule(self) -> Batch:
        num_preemptions = self.num_preemptions
        self._adopt()
        decodes, prefills = self._grow()
        if self.num_preemptions == num_preemptions:
            for sequence in self._admit():
                (decodes if sequence.num_pending == 1 else prefills).append(sequence)
        else:  # a new sequence would take the blocks that the preemption has just freed
            self._starved = self.waiting[0].arrival
        self.grant_reservations()
        batch = self._budget.share(decodes, prefills)
        if len(decodes) > batch.num_decodes:
            for sequence in batch.decodes:  # decodes past the budget take turns
                self.running.remove(sequence)
                self.running.append(sequence)
        if self._keeps_states:
            self._keep_states(batch)
        self.is_due = False
        return batch

    def _adopt(self) -> None:
        """Start adopted sequences first: they hold blocks that waiting sequences may need."""
        if self.adopted:
            for _ in range(min(self._num_slots, len(self.adopted))):
                self.running.append(self.adopted.popleft())

    def _grow(self) -> tuple[list[Sequence], list[Sequence]]:
        """Lease the blocks of the next step of running sequences. Return the decodes and the
        prefills.

        A prompt has its blocks from its admission on, but a window takes new blocks as it slides.
        """
        decodes: list[Sequence] = []
        prefills: list[Sequence] = []
        num_preemptions = self.num_preemptions
        for sequence in tuple(self.running):
            lease, num_pending = sequence.lease, sequence.num_pending
            if lease is None or not num_pending or sequence.mailbox.is_full:
                continue
            if sequence.is_ending:
                continue
            num_beyond = max(0, num_pending - self._max_chunk) if num_pending > 1 else 0
            num_tokens = sequence.num_known - num_beyond
            if num_tokens <= lease.capacity or self._make_room(sequence, lease, num_tokens):
                (decodes if num_pending == 1 else prefills).append(sequence)
        if self.num_preemptions != num_preemptions:
            decodes = [sequence for sequence in decodes if sequence.lease is not None]
            prefills = [sequence for sequence in prefills if sequence.lease is not None]
        return decodes, prefills

    def _num_lacking(self, sequence: Sequence) -> int:
        """The number of blocks that the next step of a sequence needs beyond its lease."""
        lease = sequence.lease
        if lease is None or sequence.num_known <= lease.capacity:
            return 0
        num_beyond = max(0, sequence.num_pending - self._max_chunk)
        return self.pool.num_blocks_missing(lease, sequence.num_known - num_beyond)

    def _make_room(self, sequence: Sequence, lease: Lease, num_tokens: int) -> bool:
        """Extend a lease to `num_tokens`, and preempt the sequences last in rank if blocks are
        lacking. Return False if `sequence` itself was preempted.
        """
        while self.pool.num_blocks_missing(lease, num_tokens) > self.pool.num_available:
            victim = max(self.running, key=lambda running: running.rank)
            self._preempt(victim)
            if victim is sequence:
                return False
        self.pool.grow(lease, num_tokens)
        return True

    def _preempt(self, sequence: Sequence) -> None:
        assert sequence.lease is not None
        assert not sequence.num_launched  # a launched step writes its blocks
        self.running.remove(sequence)
        self.pool.advance(sequence.lease, "preempt")
        sequence.lease = None
        sequence.num_computed = 0
        sequence.num_preemptions += 1
        self.num_preemptions += 1
        self.add(sequence)

    def grow_for_drafts(self, sequence: Sequence, num_drafts: int) -> int:
        """Extend the lease of a sequence for at most `num_drafts` draft tokens, by blocks that are
        free and that no sequence waits for. Return how many of the tokens fit.
        """
        lease, num_known = sequence.lease, len(sequence.tokens)
        assert lease is not None
        if num_known + num_drafts > lease.capacity:
            num_blocks = self.pool.num_blocks_missing(lease, num_known + num_drafts)
            if self._has_spare(num_blocks):
                self.pool.grow(lease, num_known + num_drafts)
        return min(num_drafts, lease.capacity - num_known)

    def _keep_states(self, batch: Batch) -> None:
        """Keep snapshots of recurrent states for other sequences, if blocks are to spare: one when
        a chunk of a prompt starts at a block boundary. Snapshots are evicted like other blocks.
        """
        size, num_blocks = self.pool.block_size, self.pool.shape.num_state_blocks
        for sequence, start in zip(batch.sequences, batch.starts, strict=True):
            lease = sequence.lease
            if lease is None or start % size or not 0 < start <= sequence.num_prompt:
                continue
            if self._has_spare(num_blocks) and lease.state_at(start) is lease.state_blocks:
                self.pool.keep_state(lease, start)

    def _has_spare(self, num_blocks: int) -> bool:
        """Whether `num_blocks` are available, and neither a sequence nor a reservation waits."""
        return self._starved is None and not self.reservations and self._fits(num_blocks)

    def _fits(self, num_blocks: int) -> bool:
        spare = self._watermark if self.pool.num_leased else 0
        return num_blocks + spare <= self.pool.num_available

    def _admit(self) -> list[Sequence]:
        """Start waiting sequences while slots and blocks last."""
        self._starved = None
        num_slots = self._num_slots if self.waiting else 0
        if num_slots < 1:
            return []
        computing = self.reuse.computing(self.running)
        admitted: list[Sequence] = []
        for sequence in self.waiting:
            if len(admitted) >= num_slots:
                break
            if sequence.mailbox.is_full:
                continue
            self.reuse.find(sequence)
            if self.reuse.is_awaited(sequence, computing):
                continue
            if not self._lease(sequence):
                # Later sequences do not overtake this one: a large prompt would wait for ever.
                self._starved = sequence.arrival
                break
            admitted.append(sequence)
            self.reuse.note_computing(computing, sequence)
        if admitted:
            self.running += admitted
            self.waiting = [waiting for waiting in self.waiting if waiting.lease is None]
        return admitted

    def _lease(self, sequence: Sequence) -> bool:
        """Lease blocks for all known tokens, with the cached prefix first. Return False if blocks
        are lacking, or an older reservation waits.
        """
        if self.reservations and self.reservations[0].arrival < sequence.arrival:
            return False
        prefix = self.reuse.usable(sequence)
        if not self._fits(self.pool.num_blocks_needed(len(sequence.tokens), prefix)):
            return False
        self.reuse.lease(sequence)
        return True

    def reserve(self, reservation: Reservation) -> None:
        """Queue a reservation. `reservation.granted` is set once it has a lease."""
        self.reservations.append(reservation)
        self.grant_reservations()
        self.mark_due()

    def withdraw(self, reservation: Reservation) -> None:
        """Take a reservation out of the queue, or free the lease that it has got."""
        if reservation.lease is not None:
            self.pool.advance(reservation.lease, "cancel")
        elif reservation in self.reservations:
            self.reservations.remove(reservation)
            self.grant_reservations()

    def grant_reservations(self) -> None:
        """Grant reservations in order of arrival, after older sequences that wait for blocks."""
        while self.reservations:
            reservation = self.reservations[0]
            if self._starved is not None and self._starved < reservation.arrival:
                return
            num_tokens = reservation.num_tokens
            if not self._fits(self.pool.num_blocks_needed(num_tokens, start=num_tokens)):
                return
            self.reservations.popleft()
            reservation.lease = self.pool.reserve(
                reservation.fence, num_tokens, "transfer", start=num_tokens
            )
            reservation.granted.set()
