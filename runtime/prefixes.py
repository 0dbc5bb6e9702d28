"""Prefix blocks: how they are hashed, what engines report, and how prompts are looked up."""

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

HASH_BYTES = 8  # of a digest, where engines say which blocks they have
_DIGEST_BYTES = 16
_SECRET_BYTES = 32
_SECRET = bytearray(secrets.token_bytes(_SECRET_BYTES))


def hash_secret() -> bytes:
    """The secret of this process."""
    return bytes(_SECRET)


def set_hash_secret(given: bytes) -> None:
    """Take the secret of another process, before any engine is open here. Raises ValueError."""
    if len(given) != _SECRET_BYTES:
        raise ValueError(f"a secret has {_SECRET_BYTES} bytes, not {len(given)}")
    _SECRET[:] = given


def block_content(token_ids: Iterable[int], salt: str | None) -> bytes:
    """What is hashed of a block; `salt`: of a sequence's first block."""
    content = array("I", token_ids).tobytes()
    return content if salt is None else salt.encode(errors="surrogatepass") + content


def block_digest(parent: bytes, content: bytes, key: bytes | bytearray = _SECRET) -> bytes:
    """The digest of a block after the one with digest `parent`, which is empty for the first."""
    return hashlib.blake2b(parent + content, key=key, digest_size=_DIGEST_BYTES).digest()


class CacheChanged(msgspec.Struct, frozen=True, kw_only=True, gc=False, tag="cache"):
    """Prefix blocks that a replica of an engine has stored and dropped since the report before.

    `sequence` rises by one within an `epoch`, which is one life of the replica. `is_first`: the
    reports from this one on say all that it has; what was known of it before is void. `stored` and
    `dropped` are hashes of HASH_BYTES each, one after the other; a block is in one of them, at
    most. Blocks of a beginning come before those after it.
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
    """An engine that says which prefix blocks it has. One that does not is taken to have none."""

    def report_cache(self, tell: OnCacheChanged) -> None:
        """Call `tell` with all blocks that are there now, and with changes from then on: once a
        step at most, unless there are many. Asked again, it begins anew. Nothing is noted, or sent,
        before it is asked.
        """


def hashes_in(packed: bytes) -> Iterator[bytes]:
    """The hashes that lie one after the other."""
    return (packed[at : at + HASH_BYTES] for at in range(0, len(packed), HASH_BYTES))


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


NOTHING_CACHED = Cached()


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
    """Looks prompts up in the indexes of the `engines` that requests may enter next; of those, in a
    graph of several models, the `models` of the request.

    A request counts with the most that any replica has: it is not known yet which one takes it.
    """

    hasher: Hasher
    engines: frozenset[str]
    models: Mapping[str, tuple[str, ...]]

    @classmethod
    def of(cls, setup: LookupSetup, outlet: str | None = None) -> "PrefixLookup":
        """For the engines downstream of an operator, or of one outlet of it."""
        entered = (target for target in setup.targets if target.is_next and target.engine)
        engines = (one.engine for one in entered if outlet is None or outlet in one.outlets)
        return cls(setup.hasher, frozenset(engines), setup.models)

    def looked_up(self, request: Request, indexes: Indexes) -> Request:
        """The request with the number of its cached tokens; as it is, where no engine reports."""
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
