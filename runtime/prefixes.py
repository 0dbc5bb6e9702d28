"""Which replicas of an engine have which prefix blocks, as a value, and how a prompt is looked up.

A lookup hashes the blocks of a prompt as far as some replica has them, in order, and at most twice
as far: 1.5 us a block. So a prompt of 100,000 tokens that is cached whole takes 10 ms in the loop,
one of 2,000 tokens 0.2 ms, and one that is new some microseconds. Hashes are kept for the next
lookup of the same prompt, which takes microseconds: it asks for the logarithm of as many blocks.
"""

from collections import OrderedDict
from collections.abc import Mapping
from typing import NamedTuple

import msgspec
from immutables import Map

from sagellm.runtime.block_hash import HASH_BYTES, block_content, block_digest, secret
from sagellm.runtime.messages import Request

MAX_PREFIX_BLOCKS = 1 << 19  # 78 MB where four replicas share none
_MOST_TOKENS = 1 << 20  # of prompts whose hashes are kept: those that are on their way just now


class PromptHashes:
    """The hashes of a prompt's full blocks but the last token's, each computed when it is first
    asked for. The last token is always computed anew, for its logits.
    """

    __slots__ = ("_block_size", "_digest", "_hashes", "_key", "_salt", "num_blocks", "tokens")

    def __init__(self, tokens: tuple[int, ...], salt: str, block_size: int, key: bytes) -> None:
        self.tokens = tokens
        self.num_blocks = max(0, len(tokens) - 1) // block_size
        self._salt = salt
        self._block_size = block_size
        self._key = key
        self._digest = b""
        self._hashes: list[bytes] = []

    def __getitem__(self, index: int) -> bytes:
        """The hash of a block. Raises IndexError where there is none."""
        hashes = self._hashes
        if index >= self.num_blocks:
            raise IndexError(index)
        while len(hashes) <= index:
            begin = len(hashes) * self._block_size
            tokens = self.tokens[begin : begin + self._block_size]
            content = block_content(tokens, self._salt if not begin else None)
            self._digest = block_digest(self._digest, content, self._key)
            hashes.append(self._digest[:HASH_BYTES])
        return hashes[index]


class Hasher:
    """Hashes prompts as the engines of a graph hash their blocks: with the same `key`. It keeps the
    hashes of the latest prompts, of 1 Mi tokens together: several operators ask for them.
    """

    def __init__(self, key: bytes) -> None:
        self.key = key
        self._kept: OrderedDict[tuple[int, str, int], PromptHashes] = OrderedDict()
        self._num_tokens = 0

    def hashes(self, request: Request, block_size: int) -> PromptHashes:
        """Of all tokens of a request that are known: its prompt, and what was emitted already."""
        tokens = request.prompt_token_ids
        if request.emitted_token_ids:  # rare: its engine was lost
            known = tokens + request.emitted_token_ids
            return PromptHashes(known, request.salt, block_size, self.key)
        name = id(tokens), request.salt, block_size  # the tuple is kept, so its id is not reused
        found = self._kept.get(name)
        if found is None:
            found = self._kept[name] = PromptHashes(tokens, request.salt, block_size, self.key)
            self._num_tokens += len(tokens)
            while self._num_tokens > _MOST_TOKENS and self._kept:
                _, oldest = self._kept.popitem(last=False)
                self._num_tokens -= len(oldest.tokens)
        return found


class Cached(NamedTuple):
    """How much of a prompt replicas have: `levels` are (tokens, mask of the replicas that have so
    many, and no more), the most tokens first. Replicas that have none are in no level.
    """

    levels: tuple[tuple[int, int], ...] = ()

    @property
    def most(self) -> int:
        """Tokens that the replica has which has most."""
        return self.levels[0][0] if self.levels else 0

    def num_tokens(self, replica: int) -> int:
        """Tokens that a replica has."""
        for num_tokens, mask in self.levels:
            if mask >> replica & 1:
                return num_tokens
        return 0


NOTHING = Cached()


class PrefixIndex(msgspec.Struct, frozen=True):
    """Which replicas of one engine have a block, as masks, by the block's hash.

    It is as the engine said: a block may be gone by the time that a request comes to it. Replicas
    of the mask `void` have nothing, whatever `blocks` says: theirs are being forgotten.
    """

    block_size: int
    blocks: Map[bytes, int] = Map()
    void: int = 0

    def cached(self, request: Request, hasher: Hasher, among: int = -1) -> Cached:
        """What replicas of the mask `among` have of a request's tokens. Nothing is hashed where no
        block is known; a prompt whose own logits are asked for is computed whole.
        """
        blocks = self.blocks
        if not blocks or request.sampling.prompt_logprobs is not None:
            return NOTHING
        hashes = hasher.hashes(request, self.block_size)
        held = blocks.get(hashes[0], 0) & among & ~self.void if hashes.num_blocks else 0
        if not held:
            return NOTHING
        levels, end = [], 1
        while held:
            end = self._end(hashes, held, end)
            having = blocks.get(hashes[end], 0) & held if end < hashes.num_blocks else 0
            levels.append((end * self.block_size, held & ~having))
            held = having
        return Cached(tuple(reversed(levels)))

    def _end(self, hashes: PromptHashes, held: int, start: int) -> int:
        """The first block from `start` on that not all replicas of the mask `held` have: they have
        what is before any block that they have. Found in steps that double, and then halve.
        """
        blocks, low, step = self.blocks, start, 1
        while low < hashes.num_blocks and blocks.get(hashes[low], 0) & held == held:
            start, low, step = low + 1, low + step, step * 2
        high = min(low, hashes.num_blocks)
        while start < high:
            middle = (start + high) // 2
            if blocks.get(hashes[middle], 0) & held == held:
                start = middle + 1
            else:
                high = middle
        return start


Indexes = Mapping[str, PrefixIndex]  # by engine


def new_hasher() -> Hasher:
    """Of the engines that are opened in this process, or by workers of it."""
    return Hasher(secret())
