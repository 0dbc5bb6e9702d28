"""Prefix caching: what a sequence reuses and publishes, and reports of cached blocks."""

from collections.abc import Callable, Iterable
from typing import Protocol, runtime_checkable

from sagellm.runtime.engine.sequence import Sequence
from sagellm.runtime.kv.cache_log import CacheLog, CacheReport
from sagellm.runtime.kv.pool import BlockPool
from sagellm.runtime.kv.prefix_tree import BlockKey, PrefixNode, block_key
from sagellm.runtime.prefixes import CacheChanged, OnCacheChanged, ReportsCache, hashes_in

# Digest of the block that a running prompt fills next -> rank of the prompt.
Computing = dict[bytes, tuple[int, int]]


class PrefixReuse:
    """Finds and publishes the full blocks of sequences in one pool. Only sequences of one salt
    share blocks.

    In a pool that keeps no prefixes, only choices of one request share blocks. Keys are hashed
    once, and each search continues where the previous search ended, so a step costs nothing per
    block.
    """

    def __init__(self, pool: BlockPool) -> None:
        self._pool = pool
        self.num_queried_tokens = 0  # counted when a sequence first leases blocks, as vLLM does
        self.num_hit_tokens = 0

    def find(self, sequence: Sequence) -> list[PrefixNode]:
        """Find the longest published prefix of a waiting sequence.

        At least one known token is left to compute, because its logits are needed. A prompt whose
        logprobs are wanted has no prefix, because the logits of all its tokens are needed.
        """
        found = sequence.cached_prefix
        # Nodes of the previous search may have been evicted since.
        while found and not found[-1].is_live:
            found.pop()
        for index in range(len(found), self._num_sharable(sequence)):
            parent = found[-1] if found else None
            node = self._pool.child(parent, self._key(sequence, index))
            if node is None:
                break
            found.append(node)
        return found

    def usable(self, sequence: Sequence) -> list[PrefixNode]:
        """The part of the found prefix that a sequence can begin with."""
        found = sequence.cached_prefix
        return found[: self._pool.num_reusable(found)] if self._pool.forgets else found

    def lease(self, sequence: Sequence) -> None:
        """Lease blocks for all known tokens; the found prefix is shared. Raises PoolExhausted."""
        prefix, num_tokens = self.usable(sequence), len(sequence.tokens)
        priority = sequence.state.priority
        sequence.lease = self._pool.reserve(
            sequence.fence, num_tokens, prefix=prefix, priority=priority
        )
        sequence.num_computed = len(prefix) * self._pool.block_size
        sequence.cached_prefix = []
        if sequence.num_cached is None:  # not again after a preemption
            sequence.num_cached = min(sequence.num_computed, sequence.num_prompt)
            if self._pool.keeps_prefixes and not sequence.is_scoring:
                self.num_queried_tokens += num_tokens
                self.num_hit_tokens += sequence.num_computed

    def publish(self, sequence: Sequence, *, may_swap: bool = True) -> bool:
        """Publish the blocks that are full now, so that other sequences find them.

        A block that equals a published block is swapped for it, unless `may_swap` is False because
        a launched step reads the block. Return False when such a swap has to wait.
        """
        lease = sequence.lease
        assert lease is not None
        num_known = min(sequence.num_computed, len(sequence.tokens))
        new = range(len(lease.path), num_known // self._pool.block_size)
        if new and (not lease.path or lease.path[-1].is_live):
            keys = [self._key(sequence, index) for index in new]
            return self._pool.publish(lease, keys, sequence.state.priority, may_swap=may_swap)
        return True

    def computing(self, sequences: Iterable[Sequence]) -> Computing:
        """The blocks that running prompts fill next."""
        known: Computing = {}
        for sequence in sequences:
            self.note_computing(known, sequence)
        return known

    def note_computing(self, known: Computing, sequence: Sequence) -> None:
        """Add the block that a running prompt fills next to `known`.

        Skip blocked or slow sequences: no other sequence should wait for them.
        """
        index = len(sequence.lease.path) if sequence.lease else 0
        is_stuck = sequence.is_scoring or sequence.mailbox.is_full
        if sequence.num_uncomputed < 2 or is_stuck or index >= self._num_full(sequence):
            return
        digest = self._key(sequence, index).digest
        known[digest] = min(known.get(digest, sequence.rank), sequence.rank)

    def is_awaited(self, sequence: Sequence, computing: Computing) -> bool:
        """Whether a sequence ahead in rank computes the first block that `sequence` lacks.

        `sequence` should then wait, and compute only the blocks after the shared prefix. Waiting
        does not delay it: the sequence ahead is served first in any case.
        """
        index = len(sequence.cached_prefix)
        if index >= self._num_sharable(sequence):
            return False
        rank = computing.get(self._key(sequence, index).digest)
        return rank is not None and rank < sequence.rank

    def _num_full(self, sequence: Sequence) -> int:
        return len(sequence.tokens) // self._pool.block_size

    def _num_sharable(self, sequence: Sequence) -> int:
        return 0 if sequence.is_scoring else (len(sequence.tokens) - 1) // self._pool.block_size

    def _key(self, sequence: Sequence, index: int) -> BlockKey:
        keys, size = sequence.keys, self._pool.block_size
        while len(keys) <= index:
            tokens = sequence.tokens[len(keys) * size : (len(keys) + 1) * size]
            keys.append(block_key(keys[-1] if keys else None, tokens, self._scope(sequence)))
        return keys[index]

    def _scope(self, sequence: Sequence) -> str:
        """The scope of a sequence: sequences of equal scope may share blocks. It is the salt, or
        the request if the pool keeps no prefixes.
        """
        state = sequence.state
        return state.salt if self._pool.keeps_prefixes else f"{state.epoch}/{state.request_id}"


class CacheReporter:
    """Opens a log of the pool for a reader, and calls the reader when the log has changed."""

    def __init__(self, pool: BlockPool) -> None:
        self._pool = pool
        self._log: CacheLog | None = None
        self._on_news: Callable[[], None] = lambda: None

    def open_log(self, on_news: Callable[[], None]) -> CacheLog:
        """Open a log that begins with all blocks. `on_news` is called after each step that changed
        some block. The reader of an earlier log is not called any more.
        """
        self._log = self._pool.open_log()
        self._on_news = on_news
        return self._log

    def report_to(self, tell: OnCacheChanged, engine: str, replica: int) -> None:
        """Call `tell` with reports: of all blocks now, and of changes after each step."""
        log = self.open_log(lambda: tell_all())

        def tell_all() -> None:
            while (report := log.take()) is not None:
                tell(changed_by(report, engine, replica))

        tell_all()

    def flush(self) -> None:
        """Call the reader if blocks have changed."""
        if self._log is not None and self._log.has_changes:
            self._on_news()


@runtime_checkable
class HasCacheReporter(Protocol):
    """An engine that reports its prefix blocks through a log."""

    cache: CacheReporter


class CacheMirror:
    """A copy of the set of prefix blocks of an engine that reports to a function (`take`), with a
    log of the blocks for a slow reader. `on_news` is called after each report.
    """

    def __init__(self) -> None:
        self.on_news: Callable[[], None] = lambda: None
        self._blocks: dict[bytes, None] = {}
        self.log = CacheLog(lambda: self._blocks)

    def take(self, changed: CacheChanged) -> None:
        """Apply a report of the engine."""
        if changed.is_first:
            self._blocks.clear()
            self.log.resend_all()
        for block in hashes_in(changed.stored):
            self._blocks[block] = None
            self.log.note(block, is_stored=True)
        for block in hashes_in(changed.dropped):
            self._blocks.pop(block, None)
            self.log.note(block, is_stored=False)
        self.on_news()


def open_cache_log(engine: ReportsCache, on_news: Callable[[], None]) -> CacheLog:
    """Open a log of an engine's prefix blocks. `on_news` is called when the log has changed."""
    if isinstance(engine, HasCacheReporter):
        return engine.cache.open_log(on_news)
    mirror = CacheMirror()
    engine.report_cache(mirror.take)
    mirror.on_news = on_news
    return mirror.log


def changed_by(report: CacheReport, engine: str, replica: int, epoch: int = 1) -> CacheChanged:
    """The message to the graph for a report of a log."""
    return CacheChanged(
        engine=engine,
        replica=replica,
        epoch=epoch,
        sequence=report.sequence,
        is_first=report.is_first,
        stored=report.stored,
        dropped=report.dropped,
    )
