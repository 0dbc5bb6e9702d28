"""The policy `longest_prefix_match`: the longest cached prefix first."""

from dataclasses import dataclass, field
from typing import TypeAlias

import msgspec
from immutables import Map
from msgspec.structs import replace

from sagellm.operators.policies.request_queue import QueueEntry, QueueView
from sagellm.runtime.containers import SortedChunks
from sagellm.runtime.forecast import Forecast
from sagellm.runtime.messages import Request
from sagellm.runtime.prefixes import Indexes

_DEFERRED = 1.0  # behind all others, whose keys are minus their cached tokens
_MAX_AWAITED = 8  # families whose prefix is awaited

_Family: TypeAlias = tuple[str, str, tuple[int, ...]]  # model, salt, first tokens of the prompts
_ByArrival: TypeAlias = tuple[float, int, QueueEntry]  # arrival, number
_Match: TypeAlias = tuple[float, float, int, QueueEntry]  # key, arrival, number


class MatchState(msgspec.Struct, frozen=True):
    """The state of `longest_prefix_match`. `matches`: all waiting requests, the first to go first.

    `keys`: by the number of a request. `families`: requests with short matches of their own whose
    prompts begin alike, by arrival; the first of a family leads it. `awaited`: families of which a
    request was sent, so that their prefix may be cached soon. `indexes`: those that `current`, the
    numbers of requests with keys that are up to date, refers to.
    """

    matches: SortedChunks[_Match] = SortedChunks()
    keys: Map[int, float] = Map()
    families: Map[_Family, SortedChunks[_ByArrival]] = Map()
    awaited: tuple[_Family, ...] = ()
    indexes: Indexes | None = None
    current: frozenset[int] = frozenset()


@dataclass(frozen=True)
class LongestPrefixMatch:
    """By cached tokens of the prompt, the most first; of equal ones by arrival.

    A request with at most `shared_tokens` cached tokens waits for an earlier waiting request that
    has at most as many, and whose prompt begins with the same `shared_tokens` tokens: it goes after
    all others, until that one was sent. So a prefix that many new requests share is computed once.
    While more than `fcfs_above` requests wait, the order is fifo. The queue is work-conserving: a
    request that waits for another is offered when nothing else can be. Without reports of prefix
    blocks from engines nothing is known to be cached. A prompt without cached tokens may starve
    while others have some, as long as at most `fcfs_above` requests wait.

    Cached tokens change while a request waits. They are looked up when it arrives; when it is among
    the first, before it is offered, if an engine has reported changes since; and for all requests
    of a family at once, when the prefix that one of them computed has been cached. So a match that
    grows by less, far behind the head, counts late. An input costs O(log n) and at most a window of
    look-ups; a family costs one look-up for each member.

    Source: SGLang, schedule policy `lpm` with in-batch prefix caching (schedule_policy.py: 32
    tokens as threshold for both, fcfs above 128 waiting requests). SGLang sorts anew in each step.
    """

    shared_tokens: int = field(default=32, metadata={"min": 1})
    fcfs_above: int = field(default=128, metadata={"min": 0})

    reads_cache = True

    @property
    def initial(self) -> MatchState:
        return MatchState()

    def rank(
        self, state: MatchState, request: Request, now: float, forecast: Forecast
    ) -> tuple[float, MatchState]:
        return request.stamps.arrived_s, state

    def arrived(self, state: MatchState, entry: QueueEntry, now: float) -> MatchState:
        return self._joined(state, entry, entry[3].num_cached_tokens)

    def left(self, state: MatchState, entry: QueueEntry, now: float, was_taken: bool) -> MatchState:
        family = self._family_with(state, entry)
        state = self._gone(state, entry)
        if was_taken and family is not None and family in state.families:
            others = tuple(one for one in state.awaited if one != family)
            state = replace(state, awaited=(*others, family)[-_MAX_AWAITED:])
        return state

    def best(
        self, state: MatchState, view: QueueView, number: int
    ) -> tuple[tuple[QueueEntry, ...], MatchState]:
        if len(view.entries) > self.fcfs_above:
            return view.entries.head(number), state
        if state.indexes is not view.indexes:
            state = replace(state, indexes=view.indexes, current=frozenset())
            for family in state.awaited:
                state = self._settled(state, family, view)
        while stale := [
            match[3] for match in state.matches.head(number) if match[2] not in state.current
        ]:
            for entry in stale:
                state = self._looked_up(state, entry, view)
        return tuple(match[3] for match in state.matches.head(number)), state

    def _family_of(self, request: Request) -> _Family | None:
        first = request.prompt_token_ids[: self.shared_tokens]
        if len(first) < self.shared_tokens:
            return None
        return request.model, request.salt, first

    def _family_with(self, state: MatchState, entry: QueueEntry) -> _Family | None:
        """The family that a waiting request is in: none if its own match is longer."""
        is_short = state.keys[entry[2]] >= -self.shared_tokens
        return self._family_of(entry[3]) if is_short else None

    def _looked_up(self, state: MatchState, entry: QueueEntry, view: QueueView) -> MatchState:
        """The state after a look-up for one request. If the prefix of its family is cached now, all
        members are looked up.
        """
        family = self._family_with(state, entry)
        state = self._refreshed(state, entry, view)
        if family is None or self._family_with(state, entry) is not None:
            return state
        return self._settled(state, family, view)

    def _settled(self, state: MatchState, family: _Family, view: QueueView) -> MatchState:
        """The state after a look-up for all members, if the prefix they share is cached now."""
        members = state.families.get(family)
        leader = members.first if members is not None else None
        if members is not None and leader is not None:
            if view.num_cached_tokens(leader[2][3]) <= self.shared_tokens:
                return state
            for _, _, entry in members:
                state = self._refreshed(state, entry, view)
        return replace(state, awaited=tuple(one for one in state.awaited if one != family))

    def _refreshed(self, state: MatchState, entry: QueueEntry, view: QueueView) -> MatchState:
        """The state after a look-up for one request."""
        num_cached = view.num_cached_tokens(entry[3])
        if self._key(state, entry, num_cached) != state.keys[entry[2]]:
            state = self._joined(self._gone(state, entry), entry, num_cached)
        return replace(state, current=state.current | {entry[2]})

    def _key(self, state: MatchState, entry: QueueEntry, num_cached: int) -> float:
        """The key of a waiting request with so many cached tokens."""
        family = self._family_of(entry[3]) if num_cached <= self.shared_tokens else None
        members = state.families.get(family) if family is not None else None
        first = members.first if members is not None else None
        is_behind = first is not None and first[:2] < entry[1:3]
        return _DEFERRED if is_behind else float(-num_cached)

    def _joined(self, state: MatchState, entry: QueueEntry, num_cached: int) -> MatchState:
        """The state with a request in its family, if it needs one, and with its key."""
        key = self._key(state, entry, num_cached)
        family = self._family_of(entry[3]) if num_cached <= self.shared_tokens else None
        if family is not None:
            members: SortedChunks[_ByArrival] = state.families.get(family, SortedChunks())
            leader = members.first
            if leader is not None and key != _DEFERRED:  # it arrived before the one that led
                state = _with_key(state, leader[2], _DEFERRED)
            members = members.inserted((entry[1], entry[2], entry))
            state = replace(state, families=state.families.set(family, members))
        return _with_key(state, entry, key)

    def _gone(self, state: MatchState, entry: QueueEntry) -> MatchState:
        """The state without a request. The next of its family takes the lead."""
        family = self._family_with(state, entry)
        state = replace(
            state,
            matches=state.matches.removed((state.keys[entry[2]], *entry[1:3], entry)),
            keys=state.keys.delete(entry[2]),
            current=state.current - {entry[2]},
        )
        if family is None:
            return state
        rest = state.families[family].removed((entry[1], entry[2], entry))
        if rest.first is None:
            return replace(state, families=state.families.delete(family))
        state = replace(state, families=state.families.set(family, rest))
        leader = rest.first[2]
        if state.keys[leader[2]] != _DEFERRED:
            return state
        state = replace(state, current=state.current - {leader[2]})
        return _with_key(
            state, leader, -float(min(leader[3].num_cached_tokens, self.shared_tokens))
        )


def _with_key(state: MatchState, entry: QueueEntry, key: float) -> MatchState:
    before = state.keys.get(entry[2])
    matches = state.matches
    if before is not None:
        matches = matches.removed((before, *entry[1:3], entry))
    matches = matches.inserted((key, *entry[1:3], entry))
    return replace(state, matches=matches, keys=state.keys.set(entry[2], key))
