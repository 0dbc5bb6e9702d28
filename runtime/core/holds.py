"""Holds: requests that wait for one replica, for a limited time, although others have room."""

import heapq
import math
from dataclasses import dataclass, field

from sagellm.runtime.messages import Item, Request

_Key = tuple[str, int, int]  # an operator, a choice, and an epoch of the request


@dataclass(slots=True)
class _Hold:
    request_id: str
    until_s: float
    way: tuple[str, int]  # the service operator and replica that it waits for by now
    is_over: bool = False


@dataclass(slots=True)
class Holds:
    """Each request is held back once by each operator, from its first try on. What comes to be
    tried again is not forgotten before the request ends.
    """

    _by_request: dict[str, dict[_Key, _Hold]] = field(default_factory=dict)
    _ends: list[tuple[float, int, _Hold]] = field(default_factory=list)
    _num_holds: int = 0
    has_changed: bool = False  # the next end, since somebody asked

    def holds(
        self, node: str, item: Item, way: tuple[str, int], limit_s: float, now: float
    ) -> bool:
        """Whether operator `node` may keep an item back for `way`; it has `limit_s` for that."""
        if not isinstance(item, Request):
            return False
        known = self._by_request.setdefault(item.request_id, {})
        key = node, item.choice, item.epoch
        hold = known.get(key)
        if hold is None:
            hold = known[key] = _Hold(item.request_id, now + limit_s, way)
            self._num_holds += 1
            heapq.heappush(self._ends, (hold.until_s, self._num_holds, hold))
            self.has_changed = True
        hold.way = way  # the last one: its input waits there
        return now < hold.until_s and not hold.is_over

    def forget(self, request_id: str) -> None:
        """A request has ended."""
        if request_id in self._by_request:
            for hold in self._by_request.pop(request_id).values():
                hold.is_over = True

    @property
    def next_end_s(self) -> float:
        """When the first hold ends."""
        self.has_changed = False
        while self._ends and self._ends[0][2].is_over:
            heapq.heappop(self._ends)
        return self._ends[0][0] if self._ends else math.inf

    def take_due(self, now: float) -> dict[tuple[str, int], list[str]]:
        """The ways that requests have waited for long enough, and those requests."""
        due: dict[tuple[str, int], list[str]] = {}
        while self._ends and self._ends[0][0] <= now:
            hold = heapq.heappop(self._ends)[2]
            if not hold.is_over:
                hold.is_over = True
                due.setdefault(hold.way, []).append(hold.request_id)
        return due
