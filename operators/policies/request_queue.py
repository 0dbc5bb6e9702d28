"""The queue of `policy_sort`: requests in the order of a policy, as an immutable value."""

import math
from typing import Any, TypeAlias

import msgspec
from immutables import Map
from msgspec.structs import replace

from sagellm.operators.policies.order import BEST_EFFORT, QueueOrder
from sagellm.runtime.containers import SortedChunks
from sagellm.runtime.feedback import Backlog
from sagellm.runtime.forecast import Forecast
from sagellm.runtime.messages import Request
from sagellm.runtime.operator import Signal
from sagellm.runtime.prefixes import Indexes, PrefixLookup

# Rank, arrival, number, request. The number is unique, so a sort never compares two requests.
QueueEntry: TypeAlias = tuple[float, float, int, Request]
_Expiry: TypeAlias = tuple[float, int, QueueEntry]  # `expires_s`, number, entry
# Later than the rank: at exactly the rank the slack is 0, and nothing lapses.
_REFUSED_AFTER_S = 1e-3
EntriesByRequest: TypeAlias = Map[str, tuple[QueueEntry, ...]]


class QueueView(msgspec.Struct, frozen=True, gc=False):
    """The queue, as a policy may look at it when it chooses requests. Immutable.

    `entries`: all waiting requests by rank, arrival and number. `indexes`: the prefix blocks of
    each engine; after a change it is another object.
    """

    entries: SortedChunks[QueueEntry]
    now: float
    indexes: Indexes
    lookup: PrefixLookup | None

    def num_cached_tokens(self, request: Request) -> int:
        """The tokens that the replica with most of them has cached now."""
        if self.lookup is None or not self.indexes:
            return request.num_cached_tokens
        return self.lookup.looked_up(request, self.indexes).num_cached_tokens


class RankContext(msgspec.Struct, frozen=True):
    """The values that ranks depend on, in addition to the request and the time.

    `orders`: the policy's orders, with predicted prefill times. `state`: the state of a
    RankingPolicy. `indexes`: the prefix blocks of each engine.
    """

    orders: tuple[QueueOrder, ...]
    forecast: Forecast = Forecast()
    state: Any = None
    indexes: Indexes = {}


class RequestQueue(msgspec.Struct, frozen=True):
    """The waiting requests. An update takes microseconds, however many requests wait.

    `entries` ascend by rank, arrival and number; `expiries` ascend by time. `choices`: the entries
    by request id. `declined`: the entries that were offered downstream and not taken, since credit
    last changed. `level`: the policy's level of load.
    """

    entries: SortedChunks[QueueEntry] = SortedChunks()
    expiries: SortedChunks[_Expiry] = SortedChunks()
    choices: EntriesByRequest = Map()
    declined: tuple[QueueEntry, ...] = ()
    level: int = 0
    num_arrived: int = 0
    backlog: Backlog = Backlog()  # sums over the entries, and over the requests served so far
    waiting_since_s: float = 0.0  # when the queue last became non-empty
    counted_until_s: float = 0.0  # `backlog.busy_s` includes the time up to here
    num_sent: int = 0
    num_sent_tokens: int = 0  # uncached prompt tokens of the requests sent
    context: RankContext = RankContext(())

    @property
    def wake_at(self) -> float | None:
        first = self.expiries.first
        return None if first is None else first[0]

    def with_context(self, **changes: Any) -> "RequestQueue":
        """The queue with the fields `changes` of its context replaced."""
        return replace(self, context=replace(self.context, **changes))

    def busy_s(self, now: float) -> float:
        """The total time, until `now`, during which requests waited here or engines were full."""
        backlog = self.backlog
        if now <= self.counted_until_s or backlog.is_open:
            return backlog.busy_s
        return backlog.busy_s + now - self.counted_until_s

    def with_request(self, request: Request, order: QueueOrder, now: float) -> "RequestQueue":
        """The queue with one more request. Raises ValueError for a rank of NaN, and any error of
        the rank function.
        """
        rank = float(order.rank(request))
        if math.isnan(rank):
            raise ValueError("a rank must be a number")
        number, request_id = self.num_arrived, request.request_id
        entry = (rank, request.stamps.arrived_s, number, request)
        choices = (*self.choices.get(request_id, ()), entry)
        expiries = self.expiries
        if (ends_s := _ends_s(request)) is not None:
            expiries = expiries.inserted((ends_s, number, entry))
        return RequestQueue(
            self.entries.inserted(entry),
            expiries,
            self.choices.set(request_id, choices),
            self.declined,
            self.level,
            number + 1,
            _counted(self.backlog, request, 1, request.num_uncached_tokens, self.busy_s(now)),
            self.waiting_since_s if self.backlog.num_requests else now,
            max(self.counted_until_s, now),
            self.num_sent,
            self.num_sent_tokens,
            self.context,
        )

    def entry_of(self, request: Request) -> QueueEntry:
        """The entry of a waiting request."""
        entry, *others = self.choices[request.request_id]
        if others:
            entry = next(one for one in (entry, *others) if _is_same(one[3], request))
        return entry

    def without_taken(self, entry: QueueEntry, now: float) -> "RequestQueue":
        """The queue after a request was sent downstream. No entry counts as declined any more."""
        # A request that passes an empty queue does not count as served: it was not held up, so it
        # tells nothing about the rate of service.
        waited = max(self.counted_until_s, now) > self.waiting_since_s
        return self._without(entry, now, (), was_sent=True, was_served=waited)

    def with_room(self, now: float, *, has_room: bool) -> "RequestQueue":
        """The queue after engines downstream became full (`has_room` False) or got room again."""
        backlog = replace(self.backlog, busy_s=self.busy_s(now), num_full=not has_room)
        # If room came back while nothing waited here, an engine finished a request. The operator
        # does not know which one, so a request of the mean size counts as served.
        if has_room and not len(self.entries) and self.num_sent:
            backlog = replace(
                backlog,
                num_served=backlog.num_served + 1,
                num_served_tokens=backlog.num_served_tokens + self.num_sent_tokens // self.num_sent,
            )
        return replace(self, backlog=backlog, counted_until_s=max(self.counted_until_s, now))

    def without_signalled(
        self, signal: Signal, now: float
    ) -> tuple["RequestQueue", tuple[QueueEntry, ...]]:
        """The queue without the requests that a signal ends, and the removed entries."""
        entries = self.choices.get(signal.request_id, ())
        return self._without_all([one for one in entries if signal.concerns(one[3].key)], now)

    def without_expired(
        self, now: float, num_offered: int
    ) -> tuple["RequestQueue", tuple[QueueEntry, ...]]:
        """The queue without the requests that have expired, and those that do not want to wait; and
        the removed entries. `num_offered`: later requests have not been offered downstream yet.
        """
        ended: list[QueueEntry] = []
        for ends_s, number, entry in self.expiries:
            if ends_s > now:
                break
            if number < num_offered or has_expired(entry[3], now):
                ended.append(entry)
        return self._without_all(ended, now)

    def at_level(self, level: int, order: QueueOrder) -> "RequestQueue":
        """The queue sorted by `order`, the order of another level of load."""
        queue = self
        for entry in self.entries:
            queue = queue._moved(entry, float(order.rank(entry[3])))
        return replace(queue, level=level, declined=())

    def reported(self, order: QueueOrder) -> Backlog:
        """The backlog to report upstream. A patient request has no objective, and lets requests
        with an objective pass. Under an order that ignores objectives no request is patient.
        """
        if order.lapses:
            return self.backlog
        return replace(self.backlog, num_patient=0, num_patient_tokens=0)

    def lapsed(
        self, order: QueueOrder, now: float, window: int
    ) -> tuple["RequestQueue", tuple[QueueEntry, ...]]:
        """The queue after each request whose rank has passed moved to its later rank, and the
        entries of the removed requests, if the order refuses late requests.

        `window`: late requests are moved from as many places at the head, if ranks are no times.
        """
        if order.starts_by_s is not None:
            return self._without_late(order, now, window), ()
        if order.grace_s is None:
            return self, ()
        queue, until_s, late = self, now + self.ahead_s(order), list[QueueEntry]()
        while (first := queue.entries.first) is not None and first[0] < until_s:
            rank = order.later_rank(first[3], until_s)
            if order.refuses and rank == math.inf:
                queue = queue._without(first, now, queue.declined)
                late.append(first)
            else:
                queue = queue._moved(first, rank)
        return queue, tuple(late)

    def _without_late(self, order: QueueOrder, now: float, window: int) -> "RequestQueue":
        """The queue after late requests among the first `window` went behind all others."""
        queue, until_s = self, now + self.ahead_s(order)
        while True:
            head = queue.entries.head(window)
            late = [one for one in head if one[0] < math.inf and order.is_late(one[3], until_s)]
            if not late:
                return queue
            for entry in late:
                queue = queue._moved(entry, math.inf)

    def ahead_s(self, order: QueueOrder) -> float:
        """The seconds by which ranks, as times, pass earlier."""
        return 0.0 if order.ahead_s is None else order.ahead_s(self.context.forecast)

    def lapses_at(self, order: QueueOrder) -> float | None:
        """The time after which the first request is to be refused; None: never."""
        first = self.entries.first
        if not order.refuses or first is None or first[0] >= BEST_EFFORT:
            return None
        return first[0] - self.ahead_s(order) + _REFUSED_AFTER_S

    def _moved(self, entry: QueueEntry, rank: float) -> "RequestQueue":
        """The queue after an entry moved to another rank."""
        moved = (rank, *entry[1:])
        request = entry[3]
        expiries = self.expiries
        if (ends_s := _ends_s(request)) is not None:
            expiries = expiries.removed((ends_s, entry[2], entry))
            expiries = expiries.inserted((ends_s, entry[2], moved))
        choices = self.choices[request.request_id]
        return replace(
            self,
            entries=self.entries.removed(entry).inserted(moved),
            expiries=expiries,
            choices=self.choices.set(request.request_id, _exchanged(choices, entry, moved)),
            declined=_exchanged(self.declined, entry, moved),
        )

    def _without(
        self,
        entry: QueueEntry,
        now: float,
        declined: tuple[QueueEntry, ...],
        *,
        was_sent: bool = False,
        was_served: bool = False,
    ) -> "RequestQueue":
        request, expiries = entry[3], self.expiries
        num_tokens, busy_s = request.num_uncached_tokens, self.busy_s(now)
        if (ends_s := _ends_s(request)) is not None:
            expiries = expiries.removed((ends_s, entry[2], entry))
        return RequestQueue(
            self.entries.removed(entry),
            expiries,
            _without_entry(self.choices, entry),
            declined,
            self.level,
            self.num_arrived,
            _counted(self.backlog, request, -1, num_tokens, busy_s, was_served=was_served),
            self.waiting_since_s,
            max(self.counted_until_s, now),
            self.num_sent + was_sent,
            self.num_sent_tokens + num_tokens * was_sent,
            self.context,
        )

    def _without_all(
        self, entries: list[QueueEntry], now: float
    ) -> tuple["RequestQueue", tuple[QueueEntry, ...]]:
        queue = self
        for entry in entries:
            queue = queue._without(entry, now, queue.declined)
        return queue, tuple(entries)


def _ends_s(request: Request) -> float | None:
    """When a waiting request ends: with `no_queue` as soon as it was offered, unless it resumes."""
    return request.stamps.arrived_s if request.is_impatient else request.expires_s


def has_expired(request: Request, now: float) -> bool:
    return request.expires_s is not None and request.expires_s <= now


def _without_entry(choices: EntriesByRequest, entry: QueueEntry) -> EntriesByRequest:
    request_id = entry[3].request_id
    if len(choices[request_id]) == 1:
        return choices.delete(request_id)
    rest = tuple(one for one in choices[request_id] if one[2] != entry[2])
    return choices.set(request_id, rest)


def _exchanged(
    entries: tuple[QueueEntry, ...], entry: QueueEntry, other: QueueEntry
) -> tuple[QueueEntry, ...]:
    return tuple(other if one[2] == entry[2] else one for one in entries)


def _counted(
    backlog: Backlog,
    request: Request,
    sign: int,
    num_prompt_tokens: int,
    busy_s: float,
    *,
    was_served: bool = False,
) -> Backlog:
    """The backlog after a request was added (`sign` 1) or removed (-1)."""
    is_patient = request.slo_ttft_s is None
    return Backlog(
        backlog.num_requests + sign,
        backlog.num_tokens + sign * (num_prompt_tokens + request.sampling.max_tokens),
        backlog.num_prompt_tokens + sign * num_prompt_tokens,
        backlog.num_patient + sign * is_patient,
        backlog.num_patient_tokens + sign * num_prompt_tokens * is_patient,
        backlog.num_served + was_served,
        backlog.num_served_tokens + num_prompt_tokens * was_served,
        busy_s,
        backlog.num_full,
    )


def backlogs_differ(one: Backlog, other: Backlog) -> bool:
    """Whether two backlogs differ in anything but their busy time."""
    if one is other:
        return False
    if one.num_requests != other.num_requests:
        return True
    return replace(one, busy_s=other.busy_s) != other


def _is_same(held: Request, taken: Request) -> bool:
    """Whether both are the same choice of the same request, in the same epoch."""
    return held is taken or (held.key == taken.key and held.epoch == taken.epoch)
