"""The blocks of a KV pool as numbers, for `EngineModel`: leased, cached, evicted, kept and free."""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol


@dataclass(slots=True, eq=False)
class CachedSpan:
    """The blocks of `span` tokens of a prompt. `num_users`: the sequences that use them; with none,
    they are idle: cached until other sequences need blocks.
    """

    key: bytes
    num_users: int = 0


class BlockHolder(Protocol):
    """A sequence with blocks. `keys`: a key for each `span` tokens of its prompt that it may share.

    `num_blocks`: all its blocks. `spans`: those that it shares with others, from the beginning of
    its prompt on.
    """

    keys: Sequence[bytes]
    num_blocks: int
    spans: list[CachedSpan]


@dataclass(slots=True)
class BlockModel:
    """A pool of `num_blocks` blocks of `block_size` tokens.

    `span`: the tokens of one key of a prompt, a multiple of `block_size`; 0: no prefixes are kept.
    Equal keys stand for equal tokens, and for equal tokens before them. Idle spans are evicted in
    the order in which their last sequence ended, the end of a prompt before its beginning, as in
    `PrefixTree` for requests of one priority.
    """

    num_blocks: int
    block_size: int
    span: int = 0
    num_free: int = 0
    num_evicted: int = 0
    stored: list[bytes] = field(default_factory=list)  # since they were last taken
    dropped: list[bytes] = field(default_factory=list)
    _spans: dict[bytes, CachedSpan] = field(default_factory=dict)
    _idle: OrderedDict[CachedSpan, None] = field(default_factory=OrderedDict)

    def __post_init__(self) -> None:
        self.num_free = self.num_blocks
        if self.span % self.block_size:
            raise ValueError(f"a span of {self.span} tokens is no multiple of {self.block_size}")

    @property
    def span_blocks(self) -> int:
        return self.span // self.block_size

    @property
    def num_cached(self) -> int:
        """The blocks of idle spans."""
        return len(self._idle) * self.span_blocks

    @property
    def num_available(self) -> int:
        """The blocks that sequences may take: free, or cached and idle."""
        return self.num_free + self.num_cached

    @property
    def keys(self) -> list[bytes]:
        """The keys of all spans, each after those before it in its prompt."""
        return list(self._spans)

    def has(self, key: bytes) -> bool:
        return key in self._spans

    def blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def num_cached_tokens(self, keys: Sequence[bytes], num_tokens: int) -> int:
        """The tokens of the longest cached prefix. At least one of `num_tokens` is left out."""
        return len(self._cached(keys, num_tokens)) * self.span

    def admit(self, holder: BlockHolder, num_tokens: int, num_spare: int) -> bool:
        """Give a sequence blocks for `num_tokens`, its cached prefix first. False, with nothing
        given, if less than `num_spare` blocks would be left over.
        """
        shared = self._cached(holder.keys, num_tokens) if self.span else []
        num_idle = sum(not span.num_users for span in shared)
        num_new = self.blocks_for(num_tokens) - len(shared) * self.span_blocks
        if num_new + num_spare > self.num_available - num_idle * self.span_blocks:
            return False
        for span in shared:
            self._use(span)
        holder.spans = shared
        holder.num_blocks = len(shared) * self.span_blocks
        self.grow(holder, num_tokens)
        return True

    def grow(self, holder: BlockHolder, num_tokens: int) -> None:
        """Extend the blocks of a sequence to `num_tokens`; they must be available."""
        num_new = self.blocks_for(num_tokens) - holder.num_blocks
        if num_new > 0:
            self._take(num_new)
            holder.num_blocks += num_new

    def publish(self, holder: BlockHolder, num_computed: int) -> None:
        """Let others find the computed spans of a prompt. Equal spans are kept once."""
        if not self.span:
            return
        for key in holder.keys[len(holder.spans) : num_computed // self.span]:
            span = self._spans.get(key)
            if span is None:
                span = self._spans[key] = CachedSpan(key, num_users=1)
                self.stored.append(key)
            else:
                self._use(span)
                self.num_free += self.span_blocks
            holder.spans.append(span)

    def free(self, holder: BlockHolder) -> None:
        """Take all blocks of a sequence back. Its published spans stay cached."""
        self.num_free += holder.num_blocks - len(holder.spans) * self.span_blocks
        for span in reversed(holder.spans):
            span.num_users -= 1
            if not span.num_users:
                self._idle[span] = None
        holder.spans, holder.num_blocks = [], 0

    def _cached(self, keys: Sequence[bytes], num_tokens: int) -> list[CachedSpan]:
        found = []
        for key in keys[: (num_tokens - 1) // self.span]:
            span = self._spans.get(key)
            if span is None:
                break
            found.append(span)
        return found

    def _use(self, span: CachedSpan) -> None:
        if not span.num_users:
            del self._idle[span]
        span.num_users += 1

    def _take(self, num_blocks: int) -> None:
        while self.num_free < num_blocks:
            span, _ = self._idle.popitem(last=False)
            del self._spans[span.key]
            self.dropped.append(span.key)
            self.num_free += self.span_blocks
            self.num_evicted += self.span_blocks
        self.num_free -= num_blocks


@dataclass(slots=True, eq=False)
class ReservedBlocks:
    """Blocks for a sequence that another engine computes. `num_blocks` is 0 until they are there.

    `spans` and `keys` are empty: nobody shares blocks that are still to be filled.
    """

    arrival: int
    num_tokens: int
    num_blocks: int = 0
    spans: list[CachedSpan] = field(default_factory=list)
    keys: Sequence[bytes] = ()


@dataclass(slots=True)
class KeptBlocks:
    """Blocks without a running sequence: reserved for a transfer, or held after a prefill.

    `granted`: the keys of reservations that got their blocks, until the caller clears the list.
    """

    blocks: BlockModel
    granted: list[tuple[str, int]] = field(default_factory=list)
    _waiting: dict[tuple[str, int], ReservedBlocks] = field(
        default_factory=dict
    )  # in order of arrival
    _kept: dict[tuple[str, int], BlockHolder] = field(default_factory=dict)

    @property
    def first_arrival(self) -> int | None:
        """The arrival of the first reservation that waits for blocks."""
        return next((one.arrival for one in self._waiting.values()), None)

    def reserve(self, key: tuple[str, int], arrival: int, num_tokens: int) -> None:
        self._waiting[key] = ReservedBlocks(arrival, num_tokens)

    def hold(self, key: tuple[str, int], holder: BlockHolder) -> None:
        """Keep the blocks of a sequence that has ended."""
        self._kept[key] = holder

    def has(self, key: tuple[str, int]) -> bool:
        """Whether blocks are kept under a key, or will be."""
        return key in self._kept or key in self._waiting

    def take(self, key: tuple[str, int]) -> BlockHolder | None:
        """The blocks that are kept under a key, which the caller now owns."""
        return self._kept.pop(key, None)

    def release(self, key: tuple[str, int]) -> None:
        """Free what is kept or reserved under a key; an unknown key is ignored."""
        self._waiting.pop(key, None)
        kept = self._kept.pop(key, None)
        if kept is not None:
            self.blocks.free(kept)

    def grant(self, starved: int | None, num_spare: int) -> None:
        """Grant reservations in order, after a sequence that arrived at `starved` and lacks blocks.

        `num_spare`: the blocks that must be left over.
        """
        while self._waiting:
            key, first = next(iter(self._waiting.items()))
            is_behind = starved is not None and starved < first.arrival
            if is_behind or not self.blocks.admit(first, first.num_tokens, num_spare):
                return
            self._kept[key] = self._waiting.pop(key)
            self.granted.append(key)
