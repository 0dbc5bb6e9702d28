"""What the engines of a graph have said of their prefix blocks, kept for all operators that ask."""

from collections.abc import Callable
from dataclasses import dataclass, field

from immutables import Map

from sagellm.runtime.cache_changes import CacheChanged, hashes_in
from sagellm.runtime.core.effects import AskCache
from sagellm.runtime.core.turn import Turn
from sagellm.runtime.plan import Plan
from sagellm.runtime.prefixes import PrefixIndex

Replica = tuple[str, int]  # an engine's name and a number


@dataclass(slots=True)
class _Reporter:
    """One replica: its last report, and the blocks that it is known to have. Not `is_heard`: what
    it reports is not to be used before it begins anew.
    """

    epoch: int = 0
    sequence: int = 0
    is_heard: bool = False
    blocks: set[bytes] = field(default_factory=set)


class Prefixes:
    """One index an engine, a value that operators are given as it changes.

    It takes reports in their order. After a gap, an epoch that did not begin with all blocks, or a
    loss, the replica is asked to begin anew, and until then counts as one that has nothing.

    All indexes together have `most_blocks` hashes at most. Beyond that what comes last is left
    out, so that what engines keep longest is known: they drop what is used least, which makes room.
    """

    def __init__(self, plan: Plan, turn: Turn, give: Callable[[str, PrefixIndex], None]) -> None:
        """`give` is called with an engine whose index has changed."""
        self.indexes = {
            engine: PrefixIndex(plan.facts[engine].block_size)
            for engine in plan.engines
            if engine in plan.facts and plan.reads_cache(engine)
        }
        self._most_blocks = plan.max_prefix_blocks
        self._turn = turn
        self._give = give
        self._num_blocks = 0
        self._reporters: dict[Replica, _Reporter] = {}

    def ask(self, engine: str, replica: int) -> None:
        """Ask a replica for all blocks that it has, if any operator wants to know."""
        if engine in self.indexes:
            self._reporters.setdefault((engine, replica), _Reporter()).is_heard = False
            self._turn.effects.append(AskCache(engine, replica))

    def report(self, changed: CacheChanged) -> None:
        """Take a report of a replica."""
        engine, replica = changed.engine, changed.replica
        known = self._reporters.get((engine, replica))
        if known is None:
            return
        if changed.is_first:
            self._forget(engine, replica, known)
            known.epoch, known.is_heard = changed.epoch, True
        elif not known.is_heard:
            return
        elif (changed.epoch, changed.sequence) != (known.epoch, known.sequence + 1):
            self.lose(engine, replica)
            self.ask(engine, replica)
            return
        known.sequence = changed.sequence
        self._change(engine, replica, known, changed.stored, changed.dropped)

    def lose(self, engine: str, replica: int) -> None:
        """A replica is gone, with what it had."""
        known = self._reporters.get((engine, replica))
        if known is not None:
            known.is_heard = False
            self._forget(engine, replica, known)

    @property
    def num_blocks(self) -> int:
        """Hashes that are known."""
        return self._num_blocks

    def num_blocks_of(self, engine: str, replica: int) -> int:
        """How many blocks a replica is known to have."""
        known = self._reporters.get((engine, replica))
        return len(known.blocks) if known is not None else 0

    def _forget(self, engine: str, replica: int, known: _Reporter) -> None:
        if known.blocks:
            self._change(engine, replica, known, b"", b"".join(known.blocks))

    def _change(
        self, engine: str, replica: int, known: _Reporter, stored: bytes, dropped: bytes
    ) -> None:
        if not stored and not dropped:
            return
        index, bit = self.indexes[engine], 1 << replica
        num_before = len(index.blocks)
        with index.blocks.mutate() as blocks:
            for block in hashes_in(dropped):
                if block not in known.blocks:
                    continue
                known.blocks.remove(block)
                held = blocks[block] & ~bit
                if held:
                    blocks[block] = held
                else:
                    del blocks[block]
            self._num_blocks += len(blocks) - num_before
            num_room = self._most_blocks - self._num_blocks
            for block in hashes_in(stored):
                held = blocks.get(block, 0)
                if not held:
                    if not num_room:
                        continue
                    num_room -= 1
                blocks[block] = held | bit
                known.blocks.add(block)
            after: Map[bytes, int] = blocks.finish()
        self._num_blocks = self._most_blocks - num_room
        self.indexes[engine] = PrefixIndex(index.block_size, after)
        self._give(engine, self.indexes[engine])
