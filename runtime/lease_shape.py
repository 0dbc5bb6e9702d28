"""The shape of a lease: how many blocks of a KV pool a sequence needs, and which it still reads."""

from dataclasses import dataclass
from itertools import accumulate


@dataclass(frozen=True, slots=True)
class TokenGroup:
    """Layers that keep the KV of the same tokens: the last `window` tokens, or with None all.

    For every `block_size` tokens, a group takes one block in each of its `num_tables` block tables.
    """

    num_tables: int = 1
    window: int | None = None


@dataclass(frozen=True, slots=True)
class LeaseShape:
    """The contents of a lease: block tables of token groups, and the blocks of recurrent state.

    `groups`: the group of full attention is first, if there is one. `num_state_blocks`: the blocks
    of one recurrent state. `max_ahead`: the most tokens of one sequence in the steps in progress.
    """

    block_size: int
    groups: tuple[TokenGroup, ...] = (TokenGroup(),)
    num_state_blocks: int = 0
    max_ahead: int = 0

    @property
    def has_full(self) -> bool:
        """Whether some layers keep the KV of all tokens."""
        return bool(self.groups) and self.groups[0].window is None

    @property
    def num_blocks_per_block(self) -> int:
        """The number of blocks that a long sequence takes for `block_size` more tokens."""
        return self.groups[0].num_tables if self.has_full else 0

    @property
    def forgets(self) -> bool:
        """Whether a sequence stops reading some of its blocks before it ends."""
        return self.num_state_blocks > 0 or any(group.window for group in self.groups)

    @property
    def ends(self) -> tuple[int, ...]:
        """For each group, the number of tables of all groups up to and including it."""
        return tuple(accumulate(group.num_tables for group in self.groups))

    def num_full(self, num_tokens: int) -> int:
        """The number of blocks in one table without a window, for `num_tokens` tokens."""
        return -(-num_tokens // self.block_size)

    def first(self, group: TokenGroup, position: int) -> int:
        """The index in a table of `group` of the first block that the token at `position` reads."""
        if group.window is None:
            return 0
        return max(0, position - group.window + 1) // self.block_size

    def spans(self, num_tokens: int, start: int) -> list[tuple[int, int]]:
        """For each group, the range (first, end) of blocks that each of its tables needs.

        For a sequence of `num_tokens` tokens that computes the tokens from `start` on. A group with
        a window needs fewer blocks than it fills, because blocks that the window has passed are
        reused.
        """
        end = self.num_full(num_tokens)
        found = []
        for group in self.groups:
            first = self.first(group, start)
            found.append((first, min(end, first + self._reach(group, end))))
        return found

    def num_blocks(self, num_tokens: int, start: int = 0) -> int:
        """The number of blocks that a sequence takes at its start if it shares none."""
        spans = zip(self.groups, self.spans(num_tokens, start), strict=True)
        held = sum(group.num_tables * (end - first) for group, (first, end) in spans)
        return held + self.num_state_blocks

    def num_needed(self, num_tokens: int) -> int:
        """The number of blocks with which a sequence of `num_tokens` can always be computed.

        Recurrent state counts twice: a sequence may read a snapshot and write other blocks.
        """
        return self.num_blocks(num_tokens) + self.num_state_blocks

    def num_fixed(self, num_tokens: int) -> int:
        """The part of `num_needed` that does not grow once a sequence exceeds all windows."""
        full = self.groups[0].num_tables * self.num_full(num_tokens) if self.has_full else 0
        return self.num_needed(num_tokens) - full

    def num_tokens(self, num_blocks: int, most: int) -> int:
        """The length of the longest sequence that can always be computed with `num_blocks` blocks.

        At most `most` tokens.
        """
        low, high = 0, -(-most // self.block_size)  # bisection: `num_needed` never falls
        while low < high:
            middle = (low + high + 1) // 2
            if self.num_needed(middle * self.block_size) <= num_blocks:
                low = middle
            else:
                high = middle - 1
        return min(low * self.block_size, most)

    def _reach(self, group: TokenGroup, end: int) -> int:
        """The most blocks of one table that a sequence uses at the same time."""
        # One block more, because a window rarely begins at the start of a block.
        return end if group.window is None else self.num_full(group.window + self.max_ahead) + 1
