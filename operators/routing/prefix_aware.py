"""The strategy `prefix_aware`, and the estimate of caches for engines that do not report them."""

import math
from dataclasses import dataclass, field

import msgspec
from immutables import Map
from msgspec.structs import replace

from sagellm.operators.routing.strategy import Candidates, Hold, Order
from sagellm.runtime.messages import Request
from sagellm.runtime.operator import Draw
from sagellm.runtime.prefixes import Cached, Hasher, PrefixIndex

MOST_COMPARED = 16  # the most replicas with a cached prefix that are compared at a time
_BLOCK_TOKENS = 16  # of a block, for engines that do not say their block size
_BLOCK_BYTES = 64  # of a block of text, for engines that take no tokens
_MOST_TEXT_BYTES = 1 << 16  # further text is not compared


class SentPrefixes(msgspec.Struct, frozen=True):
    """An estimate of the prefix blocks at each replica: those of the requests sent there.

    There are two generations. A block that is sent enters `young`. When `young` is full, it becomes
    `old`, and the blocks of `old` are forgotten. So a block is forgotten if its replica has not got
    it again for one to two generations, as least recently used blocks are. `num_young`: blocks in
    `young`, counted for each replica.
    """

    young: PrefixIndex
    old: PrefixIndex
    num_young: int = 0

    @classmethod
    def of(cls, block_size: int) -> "SentPrefixes":
        return cls(PrefixIndex(block_size), PrefixIndex(block_size))

    def cached(self, request: Request, hasher: Hasher) -> Cached:
        """The estimated number of cached tokens at each replica."""
        young, old = (one.cached(request, hasher).levels for one in (self.young, self.old))
        if not young or not old:
            return Cached(young or old)
        levels, seen = list[tuple[int, int]](), 0
        for num_tokens, mask in sorted((*young, *old), reverse=True):
            if mask & ~seen:
                levels.append((num_tokens, mask & ~seen))
            seen |= mask
        return Cached(tuple(levels))

    def sent(
        self, request: Request, hasher: Hasher, number: int, max_blocks: int
    ) -> "SentPrefixes":
        """The estimate after a request was sent to a replica. `max_blocks`: of both generations."""
        block_size, most = self.young.block_size, max(1, max_blocks // 2)
        hashes, young = hasher.hashes(request, block_size), self.young
        num_blocks = min(hashes.num_blocks, most)
        begin = young.cached(request, hasher, 1 << number).most // block_size
        num_young, old = self.num_young + max(num_blocks - begin, 0), self.old
        if num_young > most:
            old, young, begin = young, PrefixIndex(block_size), 0
            num_young = num_blocks
        if begin >= num_blocks:
            return self
        with young.blocks.mutate() as blocks:
            for index in range(begin, num_blocks):
                blocks[hashes[index]] = blocks.get(hashes[index], 0) | 1 << number
            after: Map[bytes, int] = blocks.finish()
        return SentPrefixes(PrefixIndex(block_size, after), old, num_young)


def _with_tokens(request: Request) -> Request:
    """The request; the bytes of its text are its tokens, if its engine takes no tokens."""
    if request.prompt_token_ids:
        return request
    text = request.prompt.encode(errors="surrogatepass")
    content = text if text else msgspec.json.encode(request.messages)
    return replace(request, prompt_token_ids=tuple(content[:_MOST_TEXT_BYTES]))


@dataclass(frozen=True, slots=True)
class PrefixAware:
    """Sends a request to the replica with the least work left, counting the request's own.

        cost = outstanding tokens of the replica, as `load_balanced` counts them, * load_weight
             + uncached tokens of the request

    The replica with the lowest cost goes first; equal replicas take turns. A cached prefix attracts
    requests until its replica has more outstanding tokens than another replica by the number of
    tokens that the prefix saves. Then the other replica computes and caches the prefix, too, so
    that no replica becomes a hot spot. If nothing is cached, the order is that of `load_balanced`.

    A decision compares the least loaded replica and the 16 replicas with the longest cached prefix;
    if more than 16 are equal, each decision compares another 16. The cost of a decision therefore
    does not grow with the number of replicas: it is some 20 us plus a lookup (see
    `runtime/prefixes.py`).

    `load_weight`: the weight of an outstanding token relative to an uncached token; 0: only caches
    count. `max_hold_s`: the longest time that a request waits for a busy replica; 0: no wait. A
    request waits only if the busy replica has cached more of the prompt than the best replica with
    room, by at least the share `min_saved` of the prompt. The wait is also no longer than the
    predicted time to compute the difference, if there is a prediction.

    While engines have reported no prefix blocks, the router estimates their caches from the
    requests that it has sent (`SentPrefixes`). The replica with the longest estimated prefix gets
    the request if the prefix is more than the share `cache_threshold` of the prompt, unless the
    replica is overloaded: it has over `balance_abs_threshold` requests more, and over
    `balance_rel_threshold` times as many, as the least loaded replica. Otherwise the least loaded
    replica gets the request. Only the first replica for a request is chosen so: that of decode is
    the least loaded. `max_blocks`: the bound of the estimate, over all replicas. Its cost is a
    lookup and 1 us for each new block.

    Sources: Dynamo's KV router (the least of uncached prefill plus active load). For the estimate,
    cache_aware of SGLang's router, with its thresholds; there the most loaded of all replicas
    decides on the balance, and here the replica with the prefix, so that one overloaded replica
    does not switch off the caches of the others.
    """

    load_weight: float = field(default=1.0, metadata={"min": 0.0})
    max_hold_s: float = field(default=0.0, metadata={"min": 0.0})
    min_saved: float = field(default=0.5, metadata={"min": 0.0, "max": 1.0})
    cache_threshold: float = field(default=0.3, metadata={"min": 0.0, "max": 1.0})
    balance_abs_threshold: int = field(default=64, metadata={"min": 0})
    balance_rel_threshold: float = field(default=1.5, metadata={"min": 1.0})
    max_blocks: int = field(default=1 << 17, metadata={"min": 2})

    @property
    def subscribes(self) -> frozenset[str]:
        return frozenset({"cache", "first_token"} if self.max_hold_s else {"cache"})

    @property
    def initial(self) -> SentPrefixes | None:
        return None

    def order(
        self, state: SentPrefixes | None, candidates: Candidates, now: float, draw: Draw
    ) -> tuple[Order, SentPrefixes | None]:
        if candidates.pool.index is None:
            return self._by_estimate(state, candidates)
        idlest = candidates.least_loaded()
        cached = candidates.cached
        if not cached.levels:
            return idlest, None
        warm = candidates.warm(cached, candidates.mask, MOST_COMPARED)
        compared = dict.fromkeys((idlest, *warm))
        ranked = sorted(compared, key=lambda number: self._cost(candidates, number))
        hold = self._hold(candidates, ranked[0]) if self.max_hold_s else None
        return (ranked if hold is None else [hold, *ranked]), None

    def _cost(self, candidates: Candidates, number: int) -> float:
        num_uncached = candidates.num_uncached_tokens(number)
        return num_uncached + self.load_weight * candidates.load(number)

    def _hold(self, candidates: Candidates, best: int) -> Hold | None:
        """A hold for the busy replica with the longest cached prefix; None: it saves too little."""
        cached = candidates.cached
        warmest = next(candidates.warm(cached, candidates.busy, 1), None)
        if warmest is None:
            return None
        num_saved = cached.num_tokens(warmest) - cached.num_tokens(best)
        num_prompt = len(candidates.request.prompt_token_ids)
        if num_saved <= 0 or num_saved < self.min_saved * num_prompt:
            return None
        saved_s = candidates.forecast.prefill_s(num_saved)
        return Hold(warmest, min(self.max_hold_s, math.inf if saved_s is None else saved_s))

    def _by_estimate(
        self, state: SentPrefixes | None, candidates: Candidates
    ) -> tuple[int, SentPrefixes | None]:
        """The replica by the estimate of what is cached, and the estimate with the request."""
        hasher, number = candidates.hasher, candidates.least_loaded()
        if hasher is None or candidates.chosen:  # decode gets its blocks from the prefill replica
            return number, None
        block_size = _block_size(candidates)
        if state is None or state.young.block_size != block_size:
            state = SentPrefixes.of(block_size)
        request = _with_tokens(candidates.request)
        cached = state.cached(request, hasher)
        warm = tuple(candidates.warm(cached, candidates.mask, MOST_COMPARED))
        if warm:
            num_tokens = cached.num_tokens(warm[0])
            equal = (one for one in warm if cached.num_tokens(one) == num_tokens)
            best = min(equal, key=candidates.load)
            share = num_tokens / len(request.prompt_token_ids)
            if share > self.cache_threshold and not self._is_overloaded(candidates, best, number):
                number = best
        return number, state.sent(request, hasher, number, self.max_blocks)

    def _is_overloaded(self, candidates: Candidates, number: int, idlest: int) -> bool:
        most, least = candidates.num_requests(number), candidates.num_requests(idlest)
        is_ahead = most - least > self.balance_abs_threshold
        return is_ahead and most > self.balance_rel_threshold * least


def _block_size(candidates: Candidates) -> int:
    """The number of tokens of a block, or of bytes if the request has no tokens."""
    if not candidates.request.prompt_token_ids:
        return _BLOCK_BYTES
    known = candidates.facts.block_size if candidates.facts is not None else 1
    return known if known > 1 else _BLOCK_TOKENS
