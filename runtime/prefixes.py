"""Prefix blocks: how they are hashed, what engines report, and how prompts are looked up.

All engines and routers of a graph hash alike. A hash covers all tokens up to the end of its block
and the salt of the tenant, and is keyed by a secret of the process that opened the graph: nobody
else can provoke a collision, or test a guess of a prompt. Worker processes get the secret over
their link. No log line has it; a decision log has it where operators read prefixes, beside the
prompts.

A look-up hashes a prompt's blocks, in order, as far as any replica has them and at most twice as
far, at 1.5 us a block: 10 ms for 100,000 cached tokens, 0.2 ms for 2,000, microseconds for a new
prompt. A later look-up of the same prompt reuses the hashes and takes microseconds.
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

HASH_BYTES = 8  # of a digest, in reports of engines
_DIGEST_BYTES = 16
_SECRET_BYTES = 32
_SECRET = bytearray(secrets.token_bytes(_SECRET_BYTES))


def hash_secret() -> bytes:
    """The secret of this process."""
    return bytes(_SECRET)


def set_hash_secret(given: bytes) -> None:
    """Use the secret of another process, before any engine is open here.

    Raises ValueError for a wrong length.
    """
    if len(given) != _SECRET_BYTES:
        raise ValueError(f"a secret has {_SECRET_BYTES} bytes, not {len(given)}")
    _SECRET[:] = given


def block_content(token_ids: Iterable[int], salt: str | None) -> bytes:
    """The hashed bytes of a block; `salt` is given for the first block of a sequence only."""
    content = array("I", token_ids).tobytes()
    return content if salt is None else salt.encode(errors="surrogatepass") + content


def block_digest(parent: bytes, content: bytes, key: bytes | bytearray = _SECRET) -> bytes:
    """The digest of a block after the block `parent`, which is empty for the first block."""
    return hashlib.blake2b(parent + content, key=key, digest_size=_DIGEST_BYTES).digest()


class CacheChanged(msgspec.Struct, frozen=True, kw_only=True, gc=False, tag="cache"):
    """Prefix blocks that a replica of an engine stored and dropped since its previous report.

    `sequence` rises by one within an `epoch`, one life of the replica. `is_first`: earlier reports
    are void, and the reports from this one on list all blocks. `stored` and `dropped`: concatenated
    hashes of HASH_BYTES; a block is in at most one of them, and never before the blocks that
    precede it.
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
    """An engine that reports its prefix blocks. Any other engine counts as having none."""

    def report_cache(self, on_change: OnCacheChanged) -> None:
        """Call `on_change` with all blocks at once, and with later changes: about once a step.

        A second call starts over with all blocks. Nothing is recorded or sent before the first
        call.
        """


def hashes_in(packed: bytes) -> Iterator[bytes]:
    """The single hashes of concatenated ones."""
    return (packed[at : at + HASH_BYTES] for at in range(0, len(packed), HASH_BYTES))


MAX_PREFIX_BLOCKS = 1 << 19  # 78 MB where four replicas share no blocks
_MAX_KEPT_TOKENS = 1 << 20  # of the prompts whose hashes are kept: those on their way to engines


class PromptHashes:
    """The hashes of the full blocks of a prompt, computed when first read.

    The last token is left out: it is always computed, for its logits.
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
        """The hash of a block. Raises IndexError past the last block."""
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
    """Hashes prompts with the `key` of the engines of a graph.

    The hashes of the latest prompts are kept, up to 1 Mi tokens, because several operators read
    them.
    """

    def __init__(self, key: bytes) -> None:
        self.key = key
        self._kept: OrderedDict[tuple[int, str, int], PromptHashes] = OrderedDict()
        self._num_tokens = 0

    def hashes(self, request: Request, block_size: int) -> PromptHashes:
        """The hashes of all known tokens of a request: the prompt and emitted tokens."""
        tokens = request.prompt_token_ids
        if request.emitted_token_ids:  # rare: an engine of the request was lost
            known = tokens + request.emitted_token_ids
            return PromptHashes(known, request.salt, block_size, self.key)
        # The hashes keep the tuple alive, so its id is not used again.
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
    """How much of a prompt the replicas have.

    `levels`: (tokens, mask of the replicas that have exactly so many), most tokens first. A replica
    without any is in no level.
    """

    levels: tuple[tuple[int, int], ...] = ()

    @property
    def most(self) -> int:
        """The tokens of the replica that has most."""
        return self.levels[0][0] if self.levels else 0

    def num_tokens(self, replica: int) -> int:
        """The tokens of one replica."""
        for num_tokens, mask in self.levels:
            if mask >> replica & 1:
                return num_tokens
        return 0


NOTHING_CACHED = Cached()


class PrefixIndex(msgspec.Struct, frozen=True):
    """The replicas of one engine that have each block, as a bit mask by the hash of the block.

    The index follows reports: a block may be evicted before a request arrives. Replicas in the mask
    `void` count as empty, although `blocks` may still list them while their blocks are removed.
    """

    block_size: int
    blocks: Map[bytes, int] = Map()
    void: int = 0

    def cached(self, request: Request, hasher: Hasher, among: int = -1) -> Cached:
        """The tokens of a request that replicas in the mask `among` have.

        Without any known block nothing is hashed. A request for prompt logprobs computes its whole
        prompt, so nothing counts as cached.
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

    def _end(self, hashes: PromptHashes, held: int, start: int) -> int:
        """The first block from `start` on that some replica of `held` lacks.

        A replica that has a block has all blocks before it. The search doubles its steps, then
        halves.
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
    """What a lookup reads of a `Target` of the operator protocol."""

    @property
    def engine(self) -> str: ...

    @property
    def is_next(self) -> bool: ...

    @property
    def outlets(self) -> frozenset[str]: ...


class LookupSetup(Protocol):
    """What a lookup reads of a `Setup` of the operator protocol."""

    @property
    def targets(self) -> tuple[TargetEngine, ...]: ...

    @property
    def hasher(self) -> Hasher: ...

    @property
    def models(self) -> Mapping[str, tuple[str, ...]]: ...


@dataclass(frozen=True, slots=True)
class PrefixLookup:
    """Looks prompts up in the indexes of the `engines` that requests enter next.

    In a graph of several models, only the engines of the request's model count (`models`). The
    replica with most tokens counts: the router has not chosen a replica yet.
    """

    hasher: Hasher
    engines: frozenset[str]
    models: Mapping[str, tuple[str, ...]]

    @classmethod
    def of(cls, setup: LookupSetup, outlet: str | None = None) -> "PrefixLookup":
        """For the engines downstream of an operator, or of one of its outlets."""
        entered = (target for target in setup.targets if target.is_next and target.engine)
        engines = (one.engine for one in entered if outlet is None or outlet in one.outlets)
        return cls(setup.hasher, frozenset(engines), setup.models)

    def looked_up(self, request: Request, indexes: Indexes) -> Request:
        """The request with its number of cached tokens; unchanged where no engine reports."""
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
