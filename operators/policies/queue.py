"""The queue of `policy_sort`: requests in the order of a policy, as a value."""

import math
from bisect import bisect_left, bisect_right
from collections.abc import Callable
from operator import itemgetter
from typing import Any, TypeAlias, TypeVar

import msgspec
from msgspec.structs import replace

from sagellm.operators.policies.order import Order
from sagellm.runtime.backlog import Backlog
from sagellm.runtime.messages import Request

T = TypeVar("T", bound=tuple[Any, ...])

# rank, arrival, number: the number is unique, so two requests are never compared.
Entry: TypeAlias = tuple[float, float, int, Request]


class Queue(msgspec.Struct, frozen=True):
    """The waiting requests. An update copies pointers (a microsecond for 1,000) and sorts nothing.

    `entries` ascend by rank, arrival and number; `expiries` are (expires_s, number), ascending.
    `declined` are candidates that found no credit since credit last changed.
    """

    entries: tuple[Entry, ...] = ()
    expiries: tuple[tuple[float, int], ...] = ()
    declined: tuple[Entry, ...] = ()
    level: int = 0
    num_arrived: int = 0
    backlog: Backlog = Backlog()  # of the entries
    busy_since_s: float = 0.0  # when something began to wait
    told_s: float = 0.0  # until when `backlog.busy_s` counts

    @property
    def wake_at(self) -> float | None:
        return self.expiries[0][0] if self.expiries else None

    def at(self, now: float) -> "Queue":
        """The same queue, its busy time counted until now."""
        if not self.entries:
            return replace(self, busy_since_s=now, told_s=now)
        busy_s = self.backlog.busy_s + max(now - self.told_s, 0.0)
        return replace(self, backlog=replace(self.backlog, busy_s=busy_s), told_s=now)

    def with_request(self, request: Request, order: Order) -> "Queue":
        """Raises what the order's rank raises, and ValueError where that is not a number."""
        rank = float(order.rank(request))
        if math.isnan(rank):
            raise ValueError("a rank must be a number")
        entry = (rank, request.stamps.arrived_s, self.num_arrived, request)
        return replace(
            self,
            entries=_inserted(self.entries, entry),
            expiries=_inserted(self.expiries, *_expiry(request, self.num_arrived)),
            backlog=_counted(self.backlog, request, 1),
            num_arrived=self.num_arrived + 1,
        )

    def without_taken(self, taken: Request) -> "Queue":
        """Without the candidate that was taken; nothing counts as declined any more."""
        entry = next(entry for entry in self.declined if _is_same(entry[3], taken))
        backlog = _counted(self.backlog, entry[3], -1)
        if self.told_s > self.busy_since_s:  # it, or one before it, has waited
            backlog = replace(
                backlog,
                num_served=backlog.num_served + 1,
                num_served_tokens=backlog.num_served_tokens + entry[3].num_uncached_tokens,
            )
        return replace(
            self,
            entries=_removed(self.entries, entry),
            expiries=_removed(self.expiries, *_expiry(entry[3], entry[2])),
            declined=(),
            backlog=backlog,
        )

    def parted(self, leaves: Callable[[Request], bool]) -> tuple["Queue", tuple[Request, ...]]:
        """The queue without the requests that leave, and those, in order."""
        gone = {entry[2]: entry[3] for entry in self.entries if leaves(entry[3])}
        if not gone:
            return self, ()
        entries = tuple(entry for entry in self.entries if entry[2] not in gone)
        expiries = tuple(expiry for expiry in self.expiries if expiry[1] not in gone)
        backlog = self.backlog
        for request in gone.values():
            backlog = _counted(backlog, request, -1)
        after = replace(self, entries=entries, expiries=expiries, backlog=backlog)
        return after, tuple(gone.values())

    def at_level(self, level: int, order: Order) -> "Queue":
        """The same requests in another order."""
        ranked = ((order.rank(entry[3]), *entry[1:]) for entry in self.entries)
        return replace(self, entries=tuple(sorted(ranked)), level=level, declined=())

    def told(self, order: Order) -> Backlog:
        """What waits, as those before it should know it: an order may make no one patient."""
        if order.lapses:
            return self.backlog
        return replace(self.backlog, num_patient=0, num_patient_tokens=0)

    def lapsed(self, order: Order, now: float) -> "Queue":
        """The same requests, those whose time has passed at their later ranks."""
        num_late = bisect_left(self.entries, now, key=itemgetter(0)) if order.lapses else 0
        if not num_late:
            return self
        moved = {
            entry[2]: (order.later_rank(entry[3], now), *entry[1:])
            for entry in self.entries[:num_late]
        }
        return replace(
            self,
            entries=tuple(sorted((*self.entries[num_late:], *moved.values()))),
            declined=tuple(moved.get(entry[2], entry) for entry in self.declined),
        )


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


def _expiry(request: Request, number: int) -> tuple[tuple[float, int], ...]:
    return () if request.expires_s is None else ((request.expires_s, number),)


def _inserted(ascending: tuple[T, ...], *items: T) -> tuple[T, ...]:
    for item in items:
        index = bisect_right(ascending, item)
        ascending = (*ascending[:index], item, *ascending[index:])
    return ascending


def _removed(ascending: tuple[T, ...], *items: T) -> tuple[T, ...]:
    for item in items:
        index = bisect_left(ascending, item)
        ascending = ascending[:index] + ascending[index + 1 :]
    return ascending
