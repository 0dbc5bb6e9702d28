"""Who computes in the next step: token budget, chunked prefill, admission, preemption."""

from bisect import insort
from collections import deque

from sagellm.runtime.engine.batch import SCORED_ROWS, Batch, Reservation
from sagellm.runtime.engine.options import Limits
from sagellm.runtime.engine.prefix_cache import PrefixReuse
from sagellm.runtime.engine.sequence import Sequence
from sagellm.runtime.engine.token_budget import share_budget
from sagellm.runtime.kv.lease import Lease
from sagellm.runtime.kv.pool import BlockPool


class Scheduler:
    """Continuous batching over one block pool, after vLLM's V1 scheduler.

    Each step first serves running decodes, then prefills in chunks; sequences join and leave at
    every step. A prompt reserves all its blocks when it is admitted, so only decodes run out of
    blocks; then the running sequence last in rank (priority, arrival) is preempted, and recomputed
    later. The first in rank is never preempted for another, and a pool holds the longest sequence:
    so some sequence always advances. Blocks that become free go to waiting sequences and landings
    in order of arrival; a sequence that adopted a landing holds its blocks and waits for a slot.
    What others have computed of a prompt, or compute right now, is not computed again (`reuse`).
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
        self.is_due = False  # what came since the last schedule may change who computes
        self.needs_rest = False  # no step may compute when the next one is collected
        self._scored: dict[Sequence, int] = {}  # what prompts that are scored may compute now
        self._sat_out_before = False
        self._is_sitting_out = False  # the first prefill in rank got nothing in the last step
        self._starved: int | None = None  # arrival of the sequence that waits for blocks
        # Keeps decodes from running dry right after an admission; vLLM's watermark of one per cent.
        self._watermark = pool.num_blocks // 100
        self._max_chunk = limits.max_chunk
        self._keeps_states = pool.shape.num_state_blocks > 0 and pool.keeps_prefixes

    @property
    def num_waiting(self) -> int:
        return len(self.waiting) + len(self.adopted)

    @property
    def num_pending_prefill_tokens(self) -> int:
        """What waiting and running prompts will cost, less what was found when last looked for."""
        total = 0
        for sequence in self.running:
            pending = sequence.num_pending
            total += pending if pending > 1 else 0
        for sequence in self.waiting:
            total += sequence.num_pending - len(sequence.found) * self.pool.block_size
        return total

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence; one that has a lease already only waits for a slot."""
        if sequence.lease is None:
            self.reuse.find(sequence)
            insort(self.waiting, sequence, key=lambda waiting: waiting.rank)
        else:
            self.adopted.append(sequence)

    def mark_due(self) -> None:
        """Something came, or became free: those who wait may be able to go on."""
        has_slot = (self.waiting or self.adopted) and self._num_slots > 0
        if has_slot or self.reservations:
            self.is_due = True

    def remove(self, sequence: Sequence) -> None:
        """Forget a sequence, wherever it is; its lease is the caller's to end."""
        for queue in (self.running, self.waiting, self.adopted):
            if sequence in queue:
                queue.remove(sequence)
                self.mark_due()
                return

    @property
    def _num_slots(self) -> int:
        """Sequences that may start; those that end with the steps under way leave theirs."""
        return self.limits.max_num_seqs - sum(not one.is_ending for one in self.running)

    def schedule(self) -> Batch:
        """The next step; empty where nothing can advance. Blocks for it are reserved."""
        self.needs_rest = False
        return self._schedule()

    def schedule_next(self) -> Batch:
        """The step after those under way, before they have sampled: as if they had, and as if no
        answer ended by what they sample. What it computes for one that does is thrown away.

        Empty also where it takes their outcome to say who computes next: a sequence needs a block
        that only a preemption gives, a reader has room for the events of one step alone, or equal
        blocks are to be merged, which takes a moment when nothing computes.
        """
        is_narrow = any(sequence.mailbox.num_free == 1 for sequence in self.running)
        num_blocks_missing = sum(map(self._num_lacking, (*self.running, *self.adopted)))
        if self.needs_rest or is_narrow or num_blocks_missing > self.pool.num_available:
            return Batch()
        return self._schedule()

    def unschedule(self, batch: Batch, *, has_begun: bool = False) -> None:
        """A batch that was scheduled ahead is not computed, or in vain: its tokens are pending
        again. What it admitted stays, with its blocks.

        One that `has_begun` may have advanced recurrent states in place, which cannot go back:
        those sequences are preempted, but for the ones that end with the step before it.
        """
        batch.end()
        self._is_sitting_out = self._sat_out_before
        if has_begun and self.pool.shape.num_state_blocks:
            for sequence, start in zip(batch.sequences, batch.starts, strict=True):
                lease = sequence.lease
                if lease is None or sequence.num_launched:
                    continue
                if lease.state_at(start) is lease.snapshot:
                    self._preempt(sequence)

    def _schedule(self) -> Batch:
        self._sat_out_before = self._is_sitting_out
        num_preemptions = self.num_preemptions
        self._adopt()
        decodes, prefills = self._grow()
        if self.num_preemptions == num_preemptions:
            for sequence in self._admit():
                (decodes if sequence.num_pending == 1 else prefills).append(sequence)
        else:
            self._starved = self.waiting[0].arrival
        self.grant_reservations()
        batch = Batch()
        prefills = self._share_scoring(prefills)
        self._add_decodes(batch, decodes, is_shared=bool(prefills))
        if prefills:
            self._add_prefills(
                batch, prefills, self.limits.max_num_batched_tokens - batch.num_tokens
            )
        if self._keeps_states:
            self._keep_states(batch)
        self.is_due = False
        return batch

    def _adopt(self) -> None:
        """Sequences that came with their blocks run first: others may wait for those blocks."""
        if self.adopted:
            for _ in range(min(self._num_slots, len(self.adopted))):
                self.running.append(self.adopted.popleft())

    def _grow(self) -> tuple[list[Sequence], list[Sequence]]:
        """Give running sequences the blocks of their next step; those that decode, and those that
        compute a prompt.

        A prompt has its blocks from the start, but for layers with a window, which slides.
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
            decodes, prefills = _leased(decodes), _leased(prefills)
        return decodes, prefills

    def _num_lacking(self, sequence: Sequence) -> int:
        """Blocks that its next step needs and its lease does not have."""
        lease = sequence.lease
        if lease is None or sequence.num_known <= lease.capacity:
            return 0
        num_beyond = max(0, sequence.num_pending - self._max_chunk)  # its next step
        return self.pool.num_blocks_missing(lease, sequence.num_known - num_beyond)

    def _make_room(self, sequence: Sequence, lease: Lease, num_tokens: int) -> bool:
        """Give a sequence its next blocks, at the cost of those after it in rank."""
        while self.pool.num_blocks_missing(lease, num_tokens) > self.pool.num_available:
            victim = max(self.running, key=lambda running: running.rank)
            self._preempt(victim)
            if victim is sequence:
                return False
        self.pool.grow(lease, num_tokens)
        return True

    def _preempt(self, sequence: Sequence) -> None:
        assert sequence.lease is not None
        assert not sequence.num_launched  # a step under way writes its blocks
        self.running.remove(sequence)
        self.pool.advance(sequence.lease, "preempt")
        sequence.lease = None
        sequence.num_computed = 0
        sequence.num_preemptions += 1
        self.num_preemptions += 1
        self.add(sequence)

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
            if not self._reserve(sequence):
                self._starved = sequence.arrival
                break
            admitted.append(sequence)
            self.reuse.note_computing(computing, sequence)
        if admitted:
            self.running += admitted
            self.waiting = [waiting for waiting in self.waiting if waiting.lease is None]
        return admitted

    def _reserve(self, sequence: Sequence) -> bool:
        """Lease blocks for all known tokens and the next, beginning with those that were found."""
        if self.reservations and self.reservations[0].arrival < sequence.arrival:
            return False
        prefix = self.reuse.usable(sequence)
        if not self._fits(self.pool.num_blocks_needed(len(sequence.tokens), prefix)):
            return False
        self.reuse.lease(sequence)
        return True

    def _fits(self, num_blocks: int) -> bool:
        spare = self._watermark if self.pool.num_leased else 0
        return num_blocks + spare <= self.pool.num_available

    def _add_decodes(self, batch: Batch, decodes: list[Sequence], *, is_shared: bool) -> None:
        """One token each; past the budget they take turns, and leave prefills a part."""
        budget = self.limits.max_num_batched_tokens
        room = budget - max(1, budget // 4) if is_shared and budget > 1 else budget
        batch.sequences = decodes[:room]
        batch.query_lens = [1] * len(batch.sequences)
        batch.starts = [sequence.num_scheduled for sequence in batch.sequences]
        batch.sampling = decodes[:room]
        batch.num_decodes = len(batch.sequences)
        if len(decodes) > room:
            for sequence in decodes[:room]:
                self.running.remove(sequence)
                self.running.append(sequence)

    def reach(self, sequence: Sequence, num_ahead: int) -> int:
        """How many tokens behind its known ones a sequence may compute, `num_ahead` at most.

        Its lease grows by blocks that are free and that nobody waits for; it keeps them.
        """
        lease, num_known = sequence.lease, len(sequence.tokens)
        assert lease is not None
        if num_known + num_ahead > lease.capacity:
            num_blocks = self.pool.num_blocks_missing(lease, num_known + num_ahead)
            if self._starved is None and not self.reservations and self._fits(num_blocks):
                self.pool.grow(lease, num_known + num_ahead)
        return min(num_ahead, lease.capacity - num_known)

    def _add_prefills(self, batch: Batch, prefills: list[Sequence], budget: int) -> None:
        shares, self._is_sitting_out = share_budget(
            prefills, budget, self._chunk, sat_out=self._is_sitting_out
        )
        for sequence, count in shares:
            batch.add(sequence, count)

    def _share_scoring(self, prefills: list[Sequence]) -> list[Sequence]:
        """Those that may compute in this step: prompts that are scored share its rows by rank."""
        self._scored, room = {}, SCORED_ROWS
        scoring = [sequence for sequence in prefills if sequence.is_scoring]
        for sequence in sorted(scoring, key=lambda scoring: scoring.rank):
            self._scored[sequence] = min(room, sequence.num_pending)
            room -= self._scored[sequence]
        return [sequence for sequence in prefills if self._scored.get(sequence) != 0]

    def _chunk(self, sequence: Sequence, budget: int) -> int:
        most = self._scored.get(sequence, budget)
        chunk = min(sequence.num_pending, self.limits.prefill_chunk or budget, budget, most)
        return self._to_boundary(sequence, chunk) if self._keeps_states else chunk

    def _to_boundary(self, sequence: Sequence, chunk: int) -> int:
        """Cut a chunk where the recurrent state after it can be found again: at the end of a block
        behind which some of the prompt is left.
        """
        start, size = sequence.num_scheduled, self.pool.block_size
        last = min(start + chunk, sequence.num_known - 1)
        return max(last // size * size - start, 0) or chunk

    def _keep_states(self, batch: Batch) -> None:
        """Where a prompt goes on at the end of a block, its state there is kept for others, if
        there are blocks to spare: one snapshot a chunk at most, evicted as other blocks are.
        """
        size, num_blocks = self.pool.block_size, self.pool.shape.num_state_blocks
        for sequence, start in zip(batch.sequences, batch.starts, strict=True):
            lease = sequence.lease
            if lease is None or start % size or not 0 < start <= sequence.num_prompt:
                continue
            is_free = self._starved is None and not self.reservations and self._fits(num_blocks)
            if is_free and lease.state_at(start) is lease.snapshot:
                self.pool.keep_state(lease, start)

    def reserve(self, reservation: Reservation) -> None:
        """Queue for blocks that another pool will fill; `reservation.granted` is set with the lease."""
        self.reservations.append(reservation)
        self.grant_reservations()
        self.mark_due()

    def withdraw(self, reservation: Reservation) -> None:
        """Stop waiting, or give a granted lease back."""
        if reservation.lease is not None:
            self.pool.advance(reservation.lease, "cancel")
        elif reservation in self.reservations:
            self.reservations.remove(reservation)
            self.grant_reservations()

    def grant_reservations(self) -> None:
        """Serve landings in order of arrival, but not before an older sequence that waits."""
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


def _leased(sequences: list[Sequence]) -> list[Sequence]:
    """Those that were not preempted."""
    return [sequence for sequence in sequences if sequence.lease is not None]
