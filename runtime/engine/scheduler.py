"""Who computes in the next step: token budget, chunked prefill, admission, preemption."""

from bisect import insort
from collections import deque

from sagellm.runtime.engine.batch import SCORED_ROWS, Batch, Landing
from sagellm.runtime.engine.limits import Limits
from sagellm.runtime.engine.sequence import Sequence
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
    """

    def __init__(self, pool: BlockPool, limits: Limits) -> None:
        self.pool = pool
        self.limits = limits
        self.running: list[Sequence] = []
        self.waiting: list[Sequence] = []  # in rank order
        self.adopted: deque[Sequence] = deque()
        self.landings: deque[Landing] = deque()
        self.num_preemptions = 0
        self._scored: dict[Sequence, int] = {}  # what prompts that are scored may compute now
        self._is_sitting_out = False  # the first prefill in rank got nothing in the last step
        self._starved: int | None = None  # arrival of the sequence that waits for blocks
        # Keeps decodes from running dry right after an admission; vLLM's watermark of one per cent.
        self._watermark = pool.num_blocks // 100

    @property
    def num_waiting(self) -> int:
        return len(self.waiting) + len(self.adopted)

    @property
    def num_pending_prefill_tokens(self) -> int:
        waiting = sum(sequence.num_pending for sequence in self.waiting)
        running = (sequence.num_pending for sequence in self.running)
        return waiting + sum(pending for pending in running if pending > 1)

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence; one that has a lease already only waits for a slot."""
        if sequence.lease is None:
            insort(self.waiting, sequence, key=lambda waiting: waiting.rank)
        else:
            self.adopted.append(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Forget a sequence, wherever it is; its lease is the caller's to end."""
        for queue in (self.running, self.waiting, self.adopted):
            if sequence in queue:
                queue.remove(sequence)
                return

    def schedule(self) -> Batch:
        """The next step; empty where nothing can advance. Blocks for it are reserved."""
        num_preemptions = self.num_preemptions
        self._adopt()
        decodes = self._grow_decodes()
        if self.num_preemptions == num_preemptions:
            decodes += self._admit()
        else:
            self._starved = self.waiting[0].arrival
        self.grant()
        batch = Batch()
        prefills = [
            sequence
            for sequence in self.running
            if sequence.num_pending > 1 and not sequence.mailbox.is_full
        ]
        prefills = self._share_scoring(prefills)
        self._add_decodes(batch, decodes, is_shared=bool(prefills))
        if prefills:
            self._add_prefills(batch, prefills, self.limits.max_step_tokens - batch.num_tokens)
        return batch

    def _adopt(self) -> None:
        """Sequences that came with their blocks run first: others may wait for those blocks."""
        while self.adopted and len(self.running) < self.limits.max_num_seqs:
            self.running.append(self.adopted.popleft())

    def _grow_decodes(self) -> list[Sequence]:
        decodes = []
        for sequence in tuple(self.running):
            lease = sequence.lease
            if lease is None or sequence.num_pending != 1 or sequence.mailbox.is_full:
                continue
            if len(sequence.tokens) <= lease.capacity or self._make_room(sequence, lease):
                decodes.append(sequence)
        return [sequence for sequence in decodes if sequence.lease is not None]

    def _make_room(self, sequence: Sequence, lease: Lease) -> bool:
        """Give a decode its next block, at the cost of those behind it in rank."""
        while not self.pool.num_free:
            victim = max(self.running, key=lambda running: running.rank)
            self._preempt(victim)
            if victim is sequence:
                return False
        self.pool.grow(lease, len(sequence.tokens))
        return True

    def _preempt(self, sequence: Sequence) -> None:
        assert sequence.lease is not None
        self.running.remove(sequence)
        self.pool.advance(sequence.lease, "preempt")
        sequence.lease = None
        sequence.num_computed = 0
        self.num_preemptions += 1
        self.add(sequence)

    def _admit(self) -> list[Sequence]:
        """Start waiting sequences while slots and blocks last; those with one pending token."""
        self._starved = None
        num_slots = self.limits.max_num_seqs - len(self.running)
        admitted: list[Sequence] = []
        for sequence in self.waiting:
            if len(admitted) >= num_slots:
                break
            if sequence.mailbox.is_full or self._awaits_sibling(sequence):
                continue
            if not self._reserve(sequence):
                self._starved = sequence.arrival
                break
            admitted.append(sequence)
        if admitted:
            self.running += admitted
            self.waiting = [waiting for waiting in self.waiting if waiting.lease is None]
        return [sequence for sequence in admitted if sequence.num_pending == 1]

    def _awaits_sibling(self, sequence: Sequence) -> bool:
        """Whether another choice is computing the same prompt, so that its blocks can be shared."""
        return not sequence.is_scoring and any(
            lease.owner == "sequence" and lease.state == "reserved" and not lease.num_filled
            for lease in self._twins(sequence)
        )

    def _reserve(self, sequence: Sequence) -> bool:
        """Lease blocks for all known tokens and the next, sharing full blocks of the prompt."""
        if self.landings and self.landings[0].arrival < sequence.arrival:
            return False
        parent, num_shared = self._parent(sequence)
        num_tokens = len(sequence.tokens)
        if not self._fits(self.pool.num_blocks_for(num_tokens) - num_shared):
            return False
        if parent is None:
            sequence.lease = self.pool.reserve(sequence.fence, num_tokens)
        else:
            sequence.lease = self.pool.fork(parent, sequence.fence, num_shared, num_tokens)
        sequence.lease.prompt = sequence.state.prompt_token_ids
        sequence.num_computed = num_shared * self.pool.block_size
        return True

    def _twins(self, sequence: Sequence) -> list[Lease]:
        """Leases of other choices with the same prompt: a user's function may have changed one."""
        prompt = sequence.state.prompt_token_ids
        return [lease for lease in self.pool.siblings(sequence.fence) if lease.prompt == prompt]

    def _parent(self, sequence: Sequence) -> tuple[Lease | None, int]:
        """A lease whose blocks hold this prompt, and how many full ones can be shared.

        At least one known token stays to be computed: it gives the logits. The partial last block
        is computed anew, which costs less than a step, and spares a copy. A prompt that is scored
        is computed whole: only its own logits say how likely its tokens are.
        """
        if sequence.is_scoring:
            return None, 0
        num_common = min(sequence.num_prompt, len(sequence.tokens) - 1)
        for lease in self._twins(sequence):
            num_shared = min(num_common, lease.num_filled) // self.pool.block_size
            if num_shared and lease.state != "receiving":
                return lease, num_shared
        return None, 0

    def _fits(self, num_blocks: int) -> bool:
        spare = self._watermark if self.pool.num_leased else 0
        return num_blocks + spare <= self.pool.num_free

    def _add_decodes(self, batch: Batch, decodes: list[Sequence], *, is_shared: bool) -> None:
        """One token each; past the budget they take turns, and leave prefills a part."""
        budget = self.limits.max_step_tokens
        room = budget - max(1, budget // 4) if is_shared and budget > 1 else budget
        batch.sequences = decodes[:room]
        batch.query_lens = [1] * len(batch.sequences)
        batch.drawing = decodes[:room]
        if len(decodes) > room:
            for sequence in decodes[:room]:
                self.running.remove(sequence)
                self.running.append(sequence)

    def _add_prefills(self, batch: Batch, prefills: list[Sequence], budget: int) -> None:
        """Half of the budget to the first in rank, the rest to the shortest first.

        So a short prompt does not wait for a long one, and none starves. Where a prompt can be
        finished in this step, the first in rank sits it out, though never twice running: a first
        token then waits for the step under way and a short one, not for two full ones.
        """
        first = min(prefills, key=lambda sequence: sequence.rank)
        others = [sequence for sequence in prefills if sequence is not first]
        others.sort(key=lambda sequence: (sequence.state.priority, sequence.num_pending))
        half = self._chunk(first, (budget + 1) // 2)
        rest = budget - half
        ending = [sequence for sequence in others if sequence.num_pending <= rest]
        self._is_sitting_out = (
            bool(ending) and first.num_pending > half and not self._is_sitting_out
        )
        for sequence in ending if self._is_sitting_out else others:
            chunk = self._chunk(sequence, rest)
            if chunk:
                batch.add(sequence, chunk)
            rest -= chunk
        whole = 0 if self._is_sitting_out else self._chunk(first, half + rest)
        if whole:
            batch.add(first, whole)

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
        return min(sequence.num_pending, self.limits.prefill_chunk or budget, budget, most)

    def land(self, landing: Landing) -> None:
        """Queue for blocks that another pool will fill; `landing.granted` is set with the lease."""
        self.landings.append(landing)
        self.grant()

    def leave(self, landing: Landing) -> None:
        """Stop waiting, or give a granted lease back."""
        if landing.lease is not None:
            self.pool.advance(landing.lease, "cancel")
        elif landing in self.landings:
            self.landings.remove(landing)
            self.grant()

    def grant(self) -> None:
        """Serve landings in order of arrival, but not before an older sequence that waits."""
        while self.landings:
            landing = self.landings[0]
            if self._starved is not None and self._starved < landing.arrival:
                return
            if not self._fits(self.pool.num_blocks_for(landing.num_tokens)):
                return
            self.landings.popleft()
            landing.lease = self.pool.reserve(landing.fence, landing.num_tokens, "transfer")
            landing.granted.set()
