"""The queue of `policy_sort`: requests in the order of a policy, as a value."""

import math
from typing import TypeAlias

import msgspec
from immutables import Map
from msgspec.structs import replace

from sagellm.operators.policies.order import Order
from sagellm.runtime.backlog import Backlog
from sagellm.runtime.messages import Request
from sagellm.runtime.operator import Signal
from sagellm.runtime.sorted_chunks import SortedChunks

# rank, arrival, number: the number is unique, so two requests are never compared.
Entry: TypeAlias = tuple[float, float, int, Request]
_Expiry: TypeAlias = tuple[float, int, Entry]


class Queue(msgspec.Struct, frozen=True):
    """The waiting requests. An update costs microseconds, however many wait.

    `entries` ascend by rank, arrival and number; `expiries` by time. `choices`: the entries of each
    request. `declined` are candidates that found no credit since credit last changed.
    """

    entries: SortedChunks[Entry] = SortedChunks()
    expiries: SortedChunks[_Expiry] = SortedChunks()
    choices: Map[str, tuple[Entry, ...]] = Map()
    declined: tuple[Entry, ...] = ()
    level: int = 0
    num_arrived: int = 0
    backlog: Backlog = Backlog()  # of the entries
    busy_since_s: float = 0.0  # when something began to wait
    told_s: float = 0.0  # until when `backlog.busy_s` counts

    @property
    def wake_at(self) -> float | None:
        first = self.expiries.first
        return None if first is None else first[0]

    def at(self, now: float) -> "Queue":
        """The same queue, its busy time counted until now."""
        if not len(self.entries):
            return replace(self, busy_since_s=now, told_s=now)
        if now <= self.told_s:
            return self
        busy_s = self.backlog.busy_s + now - self.told_s
        return replace(self, backlog=replace(self.backlog, busy_s=busy_s), told_s=now)

    def with_request(self, request: Request, order: Order) -> "Queue":
        """Raises what the order's rank raises, and ValueError where that is not a number."""
        rank = float(order.rank(request))
        if math.isnan(rank):
            raise ValueError("a rank must be a number")
        number, request_id = self.num_arrived, request.request_id
        entry = (rank, request.stamps.arrived_s, number, request)
        choices = (*self.choices.get(request_id, ()), entry)
        after = replace(
            self,
            entries=self.entries.inserted(entry),
            choices=self.choices.set(request_id, choices),
            backlog=_counted(self.backlog, request, 1),
            num_arrived=number + 1,
        )
        if request.expires_s is None:
            return after
        return replace(after, expiries=self.expiries.inserted((request.expires_s, number, entry)))

    def without_taken(self, taken: Request) -> "Queue":
        """Without the candidate that was taken; nothing counts as declined any more."""
        entry = next(one for one in self.choices[taken.request_id] if _is_same(one[3], taken))
        after = replace(self._without(entry), declined=())
        if self.told_s <= self.busy_since_s:  # nothing has waited
            return after
        backlog = replace(
            after.backlog,
            num_served=after.backlog.num_served + 1,
            num_served_tokens=after.backlog.num_served_tokens + entry[3].num_uncached_tokens,
        )
        return replace(after, backlog=backlog)

    def without_signalled(self, signal: Signal) -> tuple["Queue", tuple[Request, ...]]:
        """The queue without the requests that a signal ends, and those."""
        entries = self.choices.get(signal.request_id, ())
        return self._without_all([one for one in entries if signal.concerns(one[3].key)])

    def without_expired(self, now: float) -> tuple["Queue", tuple[Request, ...]]:
        """The queue without the requests whose time has passed, and those."""
        expired: list[Entry] = []
        for expires_s, _, entry in self.expiries:
            if expires_s > now:
                break
            expired.append(entry)
        return self._without_all(expired)

    def at_level(self, level: int, order: Order) -> "Queue":
        """The same requests in another order."""
        queue = self
        for entry in self.entries:
            queue = queue._moved(entry, float(order.rank(entry[3])))
        return replace(queue, level=level, declined=())

    def told(self, order: Order) -> Backlog:
        """What waits, as operators upstream should know it: an order may make no one patient."""
        if order.lapses:
            return self.backlog
        return replace(self.backlog, num_patient=0, num_patient_tokens=0)

    def lapsed(self, order: Order, now: float) -> "Queue":
        """The same requests, those whose time has passed at their later ranks."""
        queue = self
        while order.lapses and (first := queue.entries.first) is not None and first[0] < now:
            queue = queue._moved(first, order.later_rank(first[3], now))
        return queue

    def _moved(self, entry: Entry, rank: float) -> "Queue":
        """The same requests, one of them at another rank."""
        moved = (rank, *entry[1:])
        request = entry[3]
        expiries = self.expiries
        if request.expires_s is not None:
            expiries = expiries.removed((request.expires_s, entry[2], entry))
            expiries = expiries.inserted((request.expires_s, entry[2], moved))
        choices = self.choices[request.request_id]
        return replace(
            self,
            entries=self.entries.removed(entry).inserted(moved),
            expiries=expiries,
            choices=self.choices.set(request.request_id, _exchanged(choices, entry, moved)),
            declined=_exchanged(self.declined, entry, moved),
        )

    def _without(self, entry: Entry) -> "Queue":
        request = entry[3]
        rest = tuple(one for one in self.choices[request.request_id] if one[2] != entry[2])
        choices = self.choices.delete(request.request_id)
        after = replace(
            self,
            entries=self.entries.removed(entry),
            choices=choices.set(request.request_id, rest) if rest else choices,
            backlog=_counted(self.backlog, request, -1),
        )
        if request.expires_s is None:
            return after
        expiries = self.expiries.removed((request.expires_s, entry[2], entry))
        return replace(after, expiries=expiries)

    def _without_all(self, entries: list[Entry]) -> tuple["Queue", tuple[Request, ...]]:
        queue = self
        for entry in entries:
            queue = queue._without(entry)
        return queue, tuple(entry[3] for entry in entries)


def _exchanged(entries: tuple[Entry, ...], entry: Entry, other: Entry) -> tuple[Entry, ...]:
    return tuple(other if one[2] == entry[2] else one for one in entries)


def _counted(backlog: Backlog, request: Request, sign: int) -> Backlog:
    """The backlog with a request more, or less."""
    num_prompt_tokens = sign * request.num_uncached_tokens
    num_tokens = num_prompt_tokens + sign * request.sampling.max_tokens
    is_patient = request.slo_ttft_s is None
    return replace(
        backlog,
        num_requests=backlog.num_requests + sign,
        num_tokens=backlog.num_tokens + num_tokens,
        num_prompt_tokens=backlog.num_prompt_tokens + num_prompt_tokens,
        num_patient=backlog.num_patient + sign * is_patient,
        num_patient_tokens=backlog.num_patient_tokens + num_prompt_tokens * is_patient,
    )


def _is_same(held: Request, taken: Request) -> bool:
    return held.key == taken.key and held.epoch == taken.epoch
