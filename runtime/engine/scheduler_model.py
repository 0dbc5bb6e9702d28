"""Which sequences a modelled engine computes in its next step, as in `Scheduler`."""

from bisect import insort
from collections import deque

from sagellm.runtime.engine.block_model import BlockHolder, BlockModel, KeptBlocks
from sagellm.runtime.engine.options import Limits
from sagellm.runtime.engine.step_cost import ModelledSequence
from sagellm.runtime.engine.token_budget import decode_budget, share_budget


class SchedulerModel:
    """Admits, preempts and chooses the sequences of `EngineModel`, as `Scheduler` does for an
    engine.
    """

    def __init__(self, limits: Limits, blocks: BlockModel) -> None:
        self.limits = limits
        self.blocks = blocks
        self.kept = KeptBlocks(blocks)
        self.running: list[ModelledSequence] = []
        self.waiting: list[ModelledSequence] = []  # in rank order
        self.adopted: deque[ModelledSequence] = deque()
        self.num_preemptions = 0
        self.num_queried_tokens = 0  # of sequences that may share, counted when first admitted
        self.num_hit_tokens = 0
        self.peak_leased_blocks = 0
        self._watermark = blocks.num_blocks // 100  # as in Scheduler
        self._starved: int | None = None  # the arrival of the sequence that waits for blocks
        self._sat_out = False

    @property
    def has_slot(self) -> bool:
        return len(self.running) < self.limits.max_num_seqs

    def schedule(self) -> tuple[list[tuple[ModelledSequence, int]], bool]:
        """Choose the sequences of the next step, each with its number of tokens. Also return
        whether later steps go on alike: all sequences decode, none was preempted, and none may be
        admitted next because the reservation that it waited for has just been granted.
        """
        num_preemptions = self.num_preemptions
        while self.adopted and self.has_slot:
            self.running.append(self.adopted.popleft())
        decodes = self._grow_decodes()
        if self.num_preemptions == num_preemptions:
            decodes += self._admit()
        else:  # a new sequence would take the blocks that the preemption has just freed
            self._starved = self.waiting[0].rank[1]
        num_granted = len(self.kept.granted)
        self.grant()
        may_admit = self._starved is not None and len(self.kept.granted) > num_granted
        leased = self.blocks.num_blocks - self.blocks.num_available
        self.peak_leased_blocks = max(self.peak_leased_blocks, leased)
        prefills = [one for one in self.running if one.num_pending > 1]
        rows = self._rows(decodes, prefills)
        is_alike = len(rows) == len(decodes) and not prefills
        return rows, is_alike and self.num_preemptions == num_preemptions and not may_admit

    def count_on(self, before: "SchedulerModel") -> None:
        """Go on with the counters of the scheduler that this one replaces."""
        self.num_preemptions = before.num_preemptions
        self.num_queried_tokens = before.num_queried_tokens
        self.num_hit_tokens = before.num_hit_tokens
        self.peak_leased_blocks = before.peak_leased_blocks

    def queue(self, sequence: ModelledSequence) -> None:
        insort(self.waiting, sequence, key=lambda waiting: waiting.rank)

    def remove(self, sequence: ModelledSequence) -> None:
        """Take a sequence that has ended out of its queue."""
        for queue in (self.running, self.waiting, self.adopted):
            if sequence in queue:
                queue.remove(sequence)
                return

    def adopt(self, sequence: ModelledSequence, kept: BlockHolder) -> None:
        """Give a sequence blocks that were kept for it: they hold all its tokens but the last."""
        sequence.num_blocks, sequence.spans = kept.num_blocks, kept.spans
        kept.num_blocks, kept.spans = 0, []
        sequence.num_computed = sequence.num_known - 1
        sequence.was_admitted = True
        self.blocks.publish(sequence, min(sequence.num_computed, sequence.num_prompt))
        self.adopted.append(sequence)

    def grant(self) -> None:
        """Grant reservations whose blocks are there."""
        self.kept.grant(self._starved, self._spare())

    def _rows(
        self, decodes: list[ModelledSequence], prefills: list[ModelledSequence]
    ) -> list[tuple[ModelledSequence, int]]:
        """Choose how many tokens of each sequence one step computes. Decodes past the budget take
        turns.
        """
        budget = self.limits.max_num_batched_tokens
        room = decode_budget(budget, has_prefills=bool(prefills))
        rows = [(sequence, 1) for sequence in decodes[:room]]
        if len(decodes) > room:
            for sequence in decodes[:room]:
                self.running.remove(sequence)
                self.running.append(sequence)
        if prefills:
            left = budget - len(rows)
            shares, self._sat_out = share_budget(prefills, left, self._chunk, sat_out=self._sat_out)
            rows += shares
        return rows

    def _chunk(self, sequence: ModelledSequence, budget: int) -> int:
        return min(sequence.num_pending, self.limits.prefill_chunk or budget, budget)

    def _grow_decodes(self) -> list[ModelledSequence]:
        decodes = []
        for sequence in tuple(self.running):
            is_next = sequence.num_blocks > 0 and sequence.num_pending == 1
            if is_next and self._make_room(sequence):
                decodes.append(sequence)
        return [sequence for sequence in decodes if sequence.num_blocks]

    def _make_room(self, sequence: ModelledSequence) -> bool:
        """Give a decode its next block, and preempt the sequence last in rank if none is free.
        Return False if the decode itself was preempted.
        """
        if sequence.num_known <= sequence.num_blocks * self.blocks.block_size:
            return True
        while not self.blocks.num_available:
            victim = max(self.running, key=lambda running: running.rank)
            self._preempt(victim)
            if victim is sequence:
                return False
        self.blocks.grow(sequence, sequence.num_known)
        return True

    def _preempt(self, sequence: ModelledSequence) -> None:
        self.num_preemptions += 1
        self.running.remove(sequence)
        self.blocks.free(sequence)
        sequence.num_computed = sequence.num_cached = 0
        self.queue(sequence)

    def _admit(self) -> list[ModelledSequence]:
        """Start waiting sequences while slots and blocks last. Return the decodes among them."""
        self._starved = None
        num_slots = self.limits.max_num_seqs - len(self.running)
        if num_slots < 1 or not self.waiting:
            return []
        admitted: list[ModelledSequence] = []
        computing = {key for key in map(self._next_key, self.running) if key is not None}
        for sequence in self.waiting:
            if len(admitted) >= num_slots:
                break
            if computing and self._is_awaited(sequence, computing):
                continue
            if not self._lease(sequence):
                self._starved = sequence.rank[1]
                break
            admitted.append(sequence)
            next_key = self._next_key(sequence)
            if next_key is not None:
                computing.add(next_key)
        if admitted:
            self.running += admitted
            self.waiting = [one for one in self.waiting if not one.num_blocks]
        return [sequence for sequence in admitted if sequence.num_pending == 1]

    def _lease(self, sequence: ModelledSequence) -> bool:
        """Give a waiting sequence blocks for all its known tokens. False if blocks are lacking, or
        an older reservation waits.
        """
        reserved = self.kept.first_arrival
        if reserved is not None and reserved < sequence.rank[1]:
            return False
        if not self.blocks.admit(sequence, sequence.num_known, self._spare()):
            return False
        num_shared = len(sequence.spans) * self.blocks.span
        if self.blocks.span and not sequence.was_admitted:
            self.num_queried_tokens += sequence.num_known
            self.num_hit_tokens += num_shared
            sequence.num_cached = max(sequence.num_cached, min(num_shared, sequence.num_prompt))
        sequence.num_computed = max(num_shared, sequence.num_cached)
        sequence.was_admitted = True
        return True

    def _next_key(self, sequence: ModelledSequence) -> bytes | None:
        """The key of the span that a running prompt computes next; None: it has none."""
        index = len(sequence.spans)
        is_computing = sequence.num_pending > 1 and index < len(sequence.keys)
        return sequence.keys[index] if is_computing and self.blocks.span else None

    def _is_awaited(self, sequence: ModelledSequence, computing: set[bytes]) -> bool:
        """Whether another sequence computes the first span that a waiting sequence lacks."""
        keys = sequence.keys
        if not keys or not self.blocks.span:
            return False
        index = self.blocks.num_cached_tokens(keys, sequence.num_known) // self.blocks.span
        is_sharable = index < min(len(keys), (sequence.num_known - 1) // self.blocks.span)
        return is_sharable and keys[index] in computing

    def _spare(self) -> int:
        is_used = self.blocks.num_available < self.blocks.num_blocks
        return self._watermark if is_used else 0
