"""Prefix blocks: how they are hashed, how engines report them, and how prompts are looked up.

All engines and routers of a graph compute the same hashes. A hash covers the salt of the tenant and
all tokens up to the end of its block. It is keyed by a secret of the process that opened the graph,
so that clients cannot provoke collisions or test guesses of prompts. Worker processes get the
secret over their link. It is never logged, except in a decision log if operators read prefixes;
such a log also has the prompts.

A look-up hashes at most twice as many blocks of the prompt as any replica has, at 1.5 us a block:
10 ms for 100,000 cached tokens, 0.2 ms for 2,000, microseconds for a new prompt. A second look-up
of the same prompt reuses the hashes and takes microseconds.
"""

import hashlib
import secrets
from array import array
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple, Protocol, TypeAlias, runtime_checkable

import msgspec
from immutables import Map
from msgspec.structs import replace

from sagellm.runtime.messages import Request

HASH_BYTES = 8  # a block hash: the first bytes of its digest
_DIGEST_BYTES = 16
_SECRET_BYTES = 32
# Mutable, so that the default `key` of `block_digest` follows `set_hash_secret`.
_SECRET = bytearray(secrets.token_bytes(_SECRET_BYTES))


def hash_secret() -> bytes:
    """The secret key of block hashes in this process."""
    return bytes(_SECRET)


def set_hash_secret(given: bytes) -> None:
    """Replace the secret of this process by that of the process that opened the graph.

    To be called before any engine is opened. Raises ValueError for a wrong length.
    """
    if len(given) != _SECRET_BYTES:
        raise ValueError(f"a secret has {_SECRET_BYTES} bytes, not {len(given)}")
    _SECRET[:] = given


def block_content(token_ids: Iterable[int], salt: str | None) -> bytes:
    """The bytes to hash for a block. `salt`: None except for the first block of a sequence."""
    content = array("I", token_ids).tobytes()
    # surrogatepass: a salt from a client's JSON may have lone surrogates.
    return content if salt is None else salt.encode(errors="surrogatepass") + content


def block_digest(parent: bytes, content: bytes, key: bytes | bytearray = _SECRET) -> bytes:
    """The digest of a block. `parent`: the digest of the previous block; empty for the first."""
    return hashlib.blake2b(parent + content, key=key, digest_size=_DIGEST_BYTES).digest()


class CacheChanged(msgspec.Struct, frozen=True, kw_only=True, gc=False, tag="cache"):
    """Prefix blocks that a replica of an engine stored and dropped since its previous report.

    `epoch`: changes when the replica restarts. `sequence`: rises by one with each report of an
    epoch. `is_first`: discard all earlier reports; this report and the next reports list all
    blocks. `stored` and `dropped`: concatenated hashes of HASH_BYTES each. A block is in at most
    one of the two, and comes after the blocks that precede it in its sequence.
    """

    engine: str
    replica: int
    epoch: int
    sequence: int
    is_first: bool = False
    stored: bytes = b""
    dropped: bytes = b""


OnCacheChanged: TypeAlias = Callable[[CacheChanged], None]


@runtime_checkable
class ReportsCache(Protocol):
    """An engine that reports its prefix blocks. Other engines count as having none."""

    def report_cache(self, on_change: OnCacheChanged) -> None:
        """Call `on_change` with all blocks now, and then with every change, about once per step.

        Each further call starts over with all blocks. The engine tracks its blocks only after the
        first call.
        """


def hashes_in(packed: bytes) -> Iterator[bytes]:
    """Split concatenated hashes."""
    return (packed[at : at + HASH_BYTES] for at in range(0, len(packed), HASH_BYTES))


MAX_PREFIX_BLOCKS = 1 << 19  # 78 MB of memory if four replicas share no blocks
_MAX_KEPT_TOKENS = 1 << 20  # total tokens of the prompts whose hashes a Hasher keeps


class PromptHashes:
    """The hashes of the full blocks of a prompt, each computed when it is first read.

    The last token is left out: an engine always computes it, because it needs its logits.
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
        """The hash of block `index`. Raises IndexError past the last block."""
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


class BlockHashes(Protocol):
    """The hashes of the first `num_blocks` blocks of a prompt, by index."""

    num_blocks: int

    def __getitem__(self, index: int) -> bytes: ...


class Hasher:
    """Hashes prompts with the secret `key` of the engines of a graph.

    Keeps the hashes of the latest prompts, up to 1 Mi tokens in total, because several operators
    need the hashes of the same prompt.
    """

    def __init__(self, key: bytes) -> None:
        self.key = key
        self._kept: OrderedDict[tuple[int, str, int], PromptHashes] = OrderedDict()
        self._num_tokens = 0

    def hashes(self, request: Request, block_size: int) -> BlockHashes:
        """The block hashes of the prompt of a request and its emitted tokens."""
        tokens = request.prompt_token_ids
        if request.emitted_token_ids:  # rare, so not kept: the request resumes
            known = tokens + request.emitted_token_ids
            return PromptHashes(known, request.salt, block_size, self.key)
        # The kept hashes keep the tuple alive, so no other tuple can get its id.
        name = id(tokens), request.salt, block_size
        found = self._kept.get(name)
        if found is None:
            found = self._kept[name] = PromptHashes(tokens, request.salt, block_size, self.key)
            self._num_tokens += len(tokens)
            while self._num_tokens > _MAX_KEPT_TOKENS and self._kept:
                _, oldest = self._kept.popitem(last=False)
                self._num_tokens -= len(oldest.tokens)
        return found


class Cached(NamedTuple):
    """The number of cached tokens of a prompt at each replica.

    `levels`: (number of tokens, bit mask of the replicas that have cached this number), most tokens
    first. A replica without cached tokens is in no level.
    """

    levels: tuple[tuple[int, int], ...] = ()

    @property
    def most(self) -> int:
        """The number of cached tokens of the replica that has most."""
        return self.levels[0][0] if self.levels else 0

    def num_tokens(self, replica: int) -> int:
        """The number of cached tokens of one replica."""
        for num_tokens, mask in self.levels:
            if mask >> replica & 1:
                return num_tokens
        return 0


NOTHING_CACHED = Cached()


class PrefixIndex(msgspec.Struct, frozen=True):
    """Which replicas of one engine have each prefix block. Immutable.

    `blocks`: hash of the block -> bit mask of the replicas. `void`: a bit mask of replicas that
    count as empty; `blocks` may still list them while their blocks are removed. The index is as old
    as the latest reports: a block may be evicted before a request arrives.
    """

    block_size: int
    blocks: Map[bytes, int] = Map()
    void: int = 0

    def cached(self, request: Request, hasher: Hasher, among: int = -1) -> Cached:
        """The cached tokens of a request at the replicas in the bit mask `among`.

        Nothing counts as cached for a request with prompt logprobs, because it computes its whole
        prompt. An empty index answers without hashing.
        """
        blocks = self.blocks
        if not blocks or request.sampling.prompt_logprobs is not None:
            return NOTHING_CACHED
        hashes = hasher.hashes(request, self.block_size)
        held = blocks.get(hashes[0], 0) & among & ~self.void if hashes.num_blocks else 0
        if not held:
            return NOTHING_CACHED
        levels, end = [], 1
        while held:
            end = self._end(hashes, held, end)
            having = blocks.get(hashes[end], 0) & held if end < hashes.num_blocks else 0
            levels.append((end * self.block_size, held & ~having))
            held = having
        return Cached(tuple(reversed(levels)))

    def _end(self, hashes: BlockHashes, held: int, start: int) -> int:
        """The index of the first block from `start` on that some replica in `held` lacks.

        A galloping search, as a replica that has a block has all blocks before it: the step doubles
        until some replica lacks a block, then a binary search follows.
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
    """A hasher for the engines opened in this process or by its workers."""
    return Hasher(hash_secret())


class TargetEngine(Protocol):
    """The part of `Target` that a lookup reads. A Protocol: importing it would make a circle."""

    @property
    def engine(self) -> str: ...

    @property
    def is_next(self) -> bool: ...

    @property
    def outlets(self) -> frozenset[str]: ...


class LookupSetup(Protocol):
    """The part of `Setup` that a lookup reads. A Protocol: importing it would make a circle."""

    @property
    def targets(self) -> tuple[TargetEngine, ...]: ...

    @property
    def hasher(self) -> Hasher: ...

    @property
    def models(self) -> Mapping[str, tuple[str, ...]]: ...


@dataclass(frozen=True, slots=True)
class PrefixLookup:
    """Estimates the cached tokens of requests before a router has chosen a replica.

    `engines`: the engines that requests enter next. `models`: the engines of each model; in a graph
    of several models, only those of the request's model count. The estimate is the number of
    tokens at the replica that has most.
    """

    hasher: Hasher
    engines: frozenset[str]
    models: Mapping[str, tuple[str, ...]]

    @classmethod
    def of(cls, setup: LookupSetup, outlet: str | None = None) -> "PrefixLookup":
        """A lookup for the engines that requests enter next after an operator.

        `outlet`: only those behind this outlet of the operator.
        """
        entered = (target for target in setup.targets if target.is_next and target.engine)
        engines = (one.engine for one in entered if outlet is None or outlet in one.outlets)
        return cls(setup.hasher, frozenset(engines), setup.models)

    def looked_up(self, request: Request, indexes: Indexes) -> Request:
        """The request with `num_cached_tokens` set; unchanged if no engine reports its blocks."""
        known = [indexes[name] for name in self._engines_of(request) if name in indexes]
        if not known:
            return request
        most = max(index.cached(request, self.hasher).most for index in known)
        if most == request.num_cached_tokens:
            return request
        return replace(request, num_cached_tokens=most)

    def _engines_of(self, request: Request) -> frozenset[str]:
        if not self.models:
            return self.engines
        served = self.models.get(request.model) or next(iter(self.models.values()))
        return self.engines.intersection(served)
