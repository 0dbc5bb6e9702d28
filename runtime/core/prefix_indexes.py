"""What the engines of a graph have said of their prefix blocks, kept for all operators that ask."""

from collections.abc import Callable
from dataclasses import dataclass, field

from immutables import Map, MapMutation
from msgspec.structs import replace

from sagellm.runtime.core.effects import QueryCache, Reaction
from sagellm.runtime.plan import Plan
from sagellm.runtime.prefixes import CacheChanged, PrefixIndex, hashes_in

Replica = tuple[str, int]  # an engine's name and a number

FORGOTTEN_AT_ONCE = 1024  # blocks, in one turn: 1 to 4 ms


@dataclass(slots=True)
class _Reporter:
    """One replica: its last report, and the blocks that it is known to have, each as the one object
    that all replicas and the index share. Not `is_heard`: what it reports is not to be used before
    it begins anew. `is_asked_later`: once its blocks are forgotten.
    """

    epoch: int = 0
    sequence: int = 0
    is_heard: bool = False
    is_asked_later: bool = False
    blocks: dict[bytes, bytes] = field(default_factory=dict)


class PrefixIndexes:
    """One index an engine, a value that operators are given as it changes.

    It takes reports in their order. After a gap, an epoch that did not begin with all blocks, or a
    loss, the replica is asked to begin anew, and until then counts as one that has nothing. What it
    had is forgotten in slices, one an event; it is asked after the last.

    All indexes together have `most_blocks` hashes at most. Beyond that what comes last is left
    out, so that what engines keep longest is known: they drop what is used least, which makes room.
    Of a replica of which a block was left out no more is stored, as that may come behind the block.
    Each eighth of the bound that comes back makes one such replica be asked anew.
    """

    def __init__(
        self, plan: Plan, reaction: Reaction, give: Callable[[str, PrefixIndex], None]
    ) -> None:
        """`give` is called with an engine whose index has changed."""
        self.indexes = {
            engine: PrefixIndex(plan.facts[engine].block_size)
            for engine in plan.engines
            if engine in plan.facts and plan.reads_cache(engine)
        }
        self._most_blocks = plan.max_prefix_blocks
        self._reaction = reaction
        self._give = give
        self._num_blocks = 0
        self._num_returned = 0  # by drops and losses, since somebody was truncated
        self._reporters: dict[Replica, _Reporter] = {}
        self._forgetting: dict[Replica, None] = {}  # in order
        self._truncated: dict[Replica, None] = {}  # in order

    def ask(self, engine: str, replica: int) -> None:
        """Ask a replica for all blocks that it has, if any operator wants to know."""
        if engine not in self.indexes:
            return
        known = self._reporters.setdefault((engine, replica), _Reporter())
        known.is_heard = False
        known.is_asked_later = (engine, replica) in self._forgetting
        if not known.is_asked_later:
            self._reaction.effects.append(QueryCache(engine, replica))

    def report(self, changed: CacheChanged) -> None:
        """Take a report of a replica."""
        engine, replica = changed.engine, changed.replica
        known = self._reporters.get((engine, replica))
        if known is None:
            return
        if changed.is_first:
            self._forget(engine, replica, known)
            if known.blocks:  # that takes some events: let it say all once more
                self.ask(engine, replica)
                return
            known.epoch, known.is_heard = changed.epoch, True
        elif not known.is_heard:
            return
        elif (changed.epoch, changed.sequence) != (known.epoch, known.sequence + 1):
            self._begin_anew(engine, replica)
            return
        known.sequence = changed.sequence
        self._change(engine, replica, known, changed.stored, changed.dropped)

    def lose(self, engine: str, replica: int) -> None:
        """A replica is gone, with what it had."""
        known = self._reporters.get((engine, replica))
        if known is not None:
            self._num_returned += len(known.blocks)
            self._forget(engine, replica, known)

    def settle(self) -> None:
        """After each event: forget a slice, and ask one anew of whom blocks were left out."""
        if self._forgetting:
            self._forget_slice()
        if not self._truncated:
            self._num_returned = 0
            return
        share = max(1, self._most_blocks // 8)
        num_free = min(self._num_returned, self._most_blocks - self._num_blocks)
        if num_free >= share:
            self._num_returned = num_free - share
            self._begin_anew(*next(iter(self._truncated)))

    @property
    def num_blocks(self) -> int:
        """Hashes that are kept."""
        return self._num_blocks

    def num_blocks_of(self, engine: str, replica: int) -> int:
        """How many blocks a replica is known to have."""
        known = self._reporters.get((engine, replica))
        is_known = known is not None and (engine, replica) not in self._forgetting
        return len(known.blocks) if known is not None and is_known else 0

    def _begin_anew(self, engine: str, replica: int) -> None:
        self._forget(engine, replica, self._reporters[engine, replica])
        self.ask(engine, replica)

    def _forget(self, engine: str, replica: int, known: _Reporter) -> None:
        """It has nothing from now on."""
        known.is_heard = known.is_asked_later = False
        self._truncated.pop((engine, replica), None)
        if not known.blocks or (engine, replica) in self._forgetting:
            return
        if len(known.blocks) <= FORGOTTEN_AT_ONCE:
            self._change(engine, replica, known, b"", b"".join(known.blocks))
            return
        self._forgetting[engine, replica] = None
        index = self.indexes[engine]
        self._set(engine, replace(index, void=index.void | 1 << replica))

    def _forget_slice(self) -> None:
        """The blocks that came last go first: so none is left whose beginning is gone."""
        engine, replica = next(iter(self._forgetting))
        known, bit = self._reporters[engine, replica], 1 << replica
        index = self.indexes[engine]
        with index.blocks.mutate() as blocks:
            for _ in range(min(FORGOTTEN_AT_ONCE, len(known.blocks))):
                self._drop(blocks, known.blocks.popitem()[0], bit)
            after: Map[bytes, int] = blocks.finish()
        self._num_blocks += len(after) - len(index.blocks)
        void = index.void
        if not known.blocks:
            void &= ~bit
            del self._forgetting[engine, replica]
            if known.is_asked_later:
                self.ask(engine, replica)
        self._set(engine, PrefixIndex(index.block_size, after, void))

    def _change(
        self, engine: str, replica: int, known: _Reporter, stored: bytes, dropped: bytes
    ) -> None:
        if not stored and not dropped:
            return
        index, bit = self.indexes[engine], 1 << replica
        num_before = len(index.blocks)
        with index.blocks.mutate() as blocks:
            for block in hashes_in(dropped):
                if known.blocks.pop(block, None) is not None:
                    self._drop(blocks, block, bit)
            num_dropped = num_before - len(blocks)
            self._num_blocks -= num_dropped
            if known.is_heard:  # else it is forgotten
                self._num_returned += num_dropped
            num_room = self._most_blocks - self._num_blocks
            if (engine, replica) not in self._truncated:
                for block in hashes_in(stored):
                    held = blocks.get(block, 0)
                    if held:
                        block = self._shared(engine, held, block)
                    elif num_room:
                        num_room -= 1
                    else:
                        self._truncated[engine, replica] = None
                        break
                    blocks[block] = held | bit
                    known.blocks[block] = block
            after: Map[bytes, int] = blocks.finish()
        self._num_blocks = self._most_blocks - num_room
        self._set(engine, PrefixIndex(index.block_size, after, index.void))

    def _shared(self, engine: str, held: int, block: bytes) -> bytes:
        """The object that is a block's hash, of the first replica that has it."""
        first = (held & -held).bit_length() - 1
        return self._reporters[engine, first].blocks[block]

    def _set(self, engine: str, index: PrefixIndex) -> None:
        self.indexes[engine] = index
        self._give(engine, index)

    @staticmethod
    def _drop(blocks: MapMutation[bytes, int], block: bytes, bit: int) -> None:
        held = blocks[block] & ~bit
        if held:
            blocks[block] = held
        else:
            del blocks[block]
