"""The allocator of a block pool: free blocks, and the references of leases to each block."""

from collections.abc import Sequence

from sagellm.runtime.kv.prefix_tree import GroupBlocks, PrefixTree


class PoolExhausted(RuntimeError):
    """Fewer blocks are available than were requested. No block was taken."""


class BlockAllocator:
    """Hands out blocks, and counts the references to each block. A block is leased while it has a
    reference. Without references it is cached, if it is published in `tree`, or else free.

    If `keeps_prefixes` is False, a published block becomes free with its last reference.
    """

    def __init__(self, num_blocks: int, tree: PrefixTree, *, keeps_prefixes: bool) -> None:
        self.num_blocks = num_blocks
        self.num_leased = 0
        self.free = list(range(num_blocks - 1, -1, -1))  # a stack: the warmest block goes first
        self.references = [0] * num_blocks
        self._tree = tree
        self._keeps_prefixes = keeps_prefixes

    @property
    def num_free(self) -> int:
        return len(self.free)

    @property
    def num_available(self) -> int:
        """Blocks that can be leased: free blocks, and cached blocks, which a lease evicts."""
        return len(self.free) + self._tree.num_idle

    def require(self, count: int) -> None:
        """Raise PoolExhausted if fewer blocks than `count` are available."""
        if count > self.num_available:
            raise PoolExhausted(
                f"{count} blocks wanted, {self.num_available} of {self.num_blocks} available"
            )

    def num_idle(self, entries: Sequence[GroupBlocks]) -> int:
        """The number of blocks of `entries` that no lease refers to."""
        references = self.references
        return sum(len(one.blocks) for one in entries if not references[one.blocks[0]])

    def take(self, count: int) -> list[int]:
        """Take `count` blocks with one reference each, and evict cached blocks for them as needed.
        The caller has called `require`.
        """
        if count <= 0:
            return []
        while len(self.free) < count:
            self.free += self._tree.evict()
        taken = self.free[: -count - 1 : -1]  # blocks that were never used come in ascending order
        del self.free[-count:]
        for block in taken:
            self.references[block] = 1
        self._tree.advance_clock(count)
        self.num_leased += count
        return taken

    def refer(self, entry: GroupBlocks, priority: int) -> None:
        """Add a reference of a request of `priority` to each block of `entry`, which may be
        idle.
        """
        is_idle = not self.references[entry.blocks[0]]
        self._tree.use(entry, priority, is_idle=is_idle)
        for block in entry.blocks:
            self.references[block] += 1
            self.num_leased += is_idle

    def give(self, blocks: list[int]) -> bool:
        """Drop one reference to each block. Return whether some block became available."""
        num_given = 0
        for block in reversed(blocks):  # deepest first: the prefix tree evicts children first
            self.references[block] -= 1
            if not self.references[block]:
                num_given += 1
                if not self._tree.retire(block, keep=self._keeps_prefixes):
                    self.free.append(block)
        self.num_leased -= num_given
        return num_given > 0

    def reclaim(self, blocks: list[int]) -> None:
        """Free idle blocks that were removed from the prefix tree."""
        self.free += blocks
