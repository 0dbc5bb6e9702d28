"""Keeps the indexes of prefix blocks up to date with the reports of engines."""

from collections.abc import Callable
from dataclasses import dataclass, field

from immutables import Map, MapMutation
from msgspec.structs import replace

from sagellm.runtime.core.effects import QueryCache, Reaction
from sagellm.runtime.messages import EngineReplica
from sagellm.runtime.plan import Plan
from sagellm.runtime.prefixes import CacheChanged, PrefixIndex, hashes_in

FORGOTTEN_AT_ONCE = 1024  # blocks in one event: 1 to 4 ms


@dataclass(slots=True)
class _Reporter:
    """The last report of one replica, and the blocks that the replica has.

    `blocks`: hash -> the same hash, as the bytes object that the index and all replicas share, to
    save memory. `is_valid` False: changes are ignored until the replica reports all its blocks.
    `is_asked_later`: ask for that report once the old blocks are removed.
    """

    epoch: int = 0
    sequence: int = 0
    is_valid: bool = False
    is_asked_later: bool = False
    blocks: dict[bytes, bytes] = field(default_factory=dict)


class PrefixIndexes:
    """One `PrefixIndex` for each engine. Every change makes a new index, which operators get.

    The reports of a replica must be consecutive. If one is missing, or a new epoch does not begin
    with all blocks, the replica counts as empty and is asked to report all its blocks. Its old
    blocks are removed in slices, one slice per event of the core, so that no event takes long. The
    replica is asked after the last slice.

    All indexes together hold at most `plan.max_prefix_blocks` hashes; further blocks are left out.
    Over time the index keeps the most used blocks, because engines evict the others, and every
    eviction makes room. If a block of a replica was left out, the replica is truncated: later
    blocks are left out too, because a block is useless without the blocks before it. Each time an
    eighth of the bound has become free, one truncated replica is asked to report all its blocks.
    """

    def __init__(
        self, plan: Plan, reaction: Reaction, on_change: Callable[[str, PrefixIndex], None]
    ) -> None:
        """`on_change` is called with the name of an engine and its new index."""
        self.indexes = {
            engine: PrefixIndex(plan.facts[engine].block_size)
            for engine in plan.engines
            if engine in plan.facts and plan.reads_cache(engine)
        }
        self._max_blocks = plan.max_prefix_blocks
        self._reaction = reaction
        self._on_change = on_change
        self._num_blocks = 0
        self._num_freed = 0  # hashes removed since a replica was truncated
        self._reporters: dict[tuple[str, int], _Reporter] = {}  # by replica
        self._forgetting: dict[EngineReplica, None] = {}  # a queue: old blocks are being removed
        self._truncated: dict[EngineReplica, None] = {}  # a queue: blocks were left out

    def ask(self, engine: str, number: int) -> None:
        """Ask a replica to report all its blocks, if any operator subscribes to them."""
        if engine in self.indexes:
            self._ask(EngineReplica(engine, number))

    def report(self, changed: CacheChanged) -> None:
        """Apply a report of a replica."""
        replica = EngineReplica(changed.engine, changed.replica)
        known = self._reporters.get(replica)
        if known is None:
            return
        if changed.is_first:
            self._forget(replica, known)
            if known.blocks:  # forgetting takes several events: ask for a full report after them
                self._ask(replica)
                return
            known.epoch, known.is_valid = changed.epoch, True
        elif not known.is_valid:
            return
        elif (changed.epoch, changed.sequence) != (known.epoch, known.sequence + 1):
            self._begin_anew(replica)
            return
        known.sequence = changed.sequence
        self._change(replica, known, changed.stored, changed.dropped)

    def lose(self, engine: str, number: int) -> None:
        """Forget the blocks of a lost replica."""
        replica = EngineReplica(engine, number)
        known = self._reporters.get(replica)
        if known is not None:
            self._num_freed += len(known.blocks)
            self._forget(replica, known)

    def settle(self) -> None:
        """Remove one slice of old blocks, and ask one truncated replica if there is room for it.

        The core calls this after each event.
        """
        if self._forgetting:
            self._forget_slice()
        if not self._truncated:
            self._num_freed = 0
            return
        share = max(1, self._max_blocks // 8)
        num_free = min(self._num_freed, self._max_blocks - self._num_blocks)
        if num_free >= share:
            self._num_freed = num_free - share
            self._begin_anew(next(iter(self._truncated)))

    @property
    def num_blocks(self) -> int:
        """The number of hashes in all indexes."""
        return self._num_blocks

    def num_blocks_of(self, engine: str, number: int) -> int:
        """The number of blocks that a replica is known to have; 0 while old blocks are removed."""
        replica = EngineReplica(engine, number)
        known = self._reporters.get(replica)
        return 0 if known is None or replica in self._forgetting else len(known.blocks)

    def _ask(self, replica: EngineReplica) -> None:
        known = self._reporters.setdefault(replica, _Reporter())
        known.is_valid = False
        known.is_asked_later = replica in self._forgetting
        if not known.is_asked_later:
            self._reaction.effects.append(QueryCache(*replica))

    def _begin_anew(self, replica: EngineReplica) -> None:
        self._forget(replica, self._reporters[replica])
        self._ask(replica)

    def _forget(self, replica: EngineReplica, known: _Reporter) -> None:
        """Count a replica as empty, and remove its blocks.

        More than `FORGOTTEN_AT_ONCE` blocks are marked void now, and removed in later events.
        """
        known.is_valid = known.is_asked_later = False
        self._truncated.pop(replica, None)
        if not known.blocks or replica in self._forgetting:
            return
        if len(known.blocks) <= FORGOTTEN_AT_ONCE:
            self._change(replica, known, b"", b"".join(known.blocks))
            return
        self._forgetting[replica] = None
        index = self.indexes[replica.engine]
        self._set(replica.engine, replace(index, void=index.void | 1 << replica.number))

    def _forget_slice(self) -> None:
        """Remove one slice of blocks, the latest first, so that no block outlives its parent."""
        replica = next(iter(self._forgetting))
        known, bit = self._reporters[replica], 1 << replica.number
        index = self.indexes[replica.engine]
        with index.blocks.mutate() as blocks:
            for _ in range(min(FORGOTTEN_AT_ONCE, len(known.blocks))):
                self._drop(blocks, known.blocks.popitem()[0], bit)
            after: Map[bytes, int] = blocks.finish()
        self._num_blocks += len(after) - len(index.blocks)
        void = index.void
        if not known.blocks:
            void &= ~bit
            del self._forgetting[replica]
            if known.is_asked_later:
                self._ask(replica)
        self._set(replica.engine, PrefixIndex(index.block_size, after, void))

    def _change(
        self, replica: EngineReplica, known: _Reporter, stored: bytes, dropped: bytes
    ) -> None:
        if not stored and not dropped:
            return
        engine, bit = replica.engine, 1 << replica.number
        index = self.indexes[engine]
        num_before = len(index.blocks)
        with index.blocks.mutate() as blocks:
            for block in hashes_in(dropped):
                if known.blocks.pop(block, None) is not None:
                    self._drop(blocks, block, bit)
            num_dropped = num_before - len(blocks)
            self._num_blocks -= num_dropped
            if known.is_valid:  # else these blocks are being forgotten, and were counted before
                self._num_freed += num_dropped
            num_room = self._max_blocks - self._num_blocks
            if replica not in self._truncated:
                for block in hashes_in(stored):
                    held = blocks.get(block, 0)
                    if held:
                        block = self._shared(engine, held, block)
                    elif num_room:
                        num_room -= 1
                    else:
                        self._truncated[replica] = None
                        break
                    blocks[block] = held | bit
                    known.blocks[block] = block
            after: Map[bytes, int] = blocks.finish()
        self._num_blocks = self._max_blocks - num_room
        self._set(engine, PrefixIndex(index.block_size, after, index.void))

    def _shared(self, engine: str, held: int, block: bytes) -> bytes:
        """The shared bytes object of a block's hash, from the first replica in the mask `held`."""
        first = (held & -held).bit_length() - 1
        return self._reporters[engine, first].blocks[block]

    def _set(self, engine: str, index: PrefixIndex) -> None:
        self.indexes[engine] = index
        self._on_change(engine, index)

    @staticmethod
    def _drop(blocks: MapMutation[bytes, int], block: bytes, bit: int) -> None:
        held = blocks[block] & ~bit
        if held:
            blocks[block] = held
        else:
            del blocks[block]
