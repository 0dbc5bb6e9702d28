"""Parking: inputs and items that found no credit, until credit comes back."""

from collections import defaultdict
from dataclasses import dataclass, field
from itertools import count
from typing import TypeAlias

from sagellm.runtime.core.meter import Stopwatch
from sagellm.runtime.messages import Item, Request
from sagellm.runtime.operator import Arrival, Input

Way: TypeAlias = tuple[str, int | None]  # a service operator, and one replica or any of them


@dataclass(slots=True, eq=False)
class ParkedInput:
    """An input of a logic operator. What it leads to finds no credit at `way`."""

    node: str
    happened: Input
    way: Way
    watches: list[Stopwatch]
    number: int = 0

    @property
    def request_id(self) -> str | None:
        """The request that waits, if it is one."""
        item = self.happened.item if isinstance(self.happened, Arrival) else None
        return item.request_id if isinstance(item, Request) else None


@dataclass(slots=True, eq=False)
class ParkedItems:
    """Items that a port or a service operator sends: the first of them finds no credit at `way`.

    `request_id`: of the request, if the items are requests; all are of one then.
    """

    ticket: int
    source: str
    replica: int
    items: tuple[Item, ...]
    outlet: str
    request_id: str | None
    way: Way = ("", None)
    watches: list[Stopwatch] = field(default_factory=list)
    number: int = 0


Parked: TypeAlias = ParkedInput | ParkedItems


class Parking:
    """All that is parked: by what it waits for, in order, by request and by ticket."""

    def __init__(self) -> None:
        self._numbers = count(1)
        self._by_way: defaultdict[Way, dict[int, Parked]] = defaultdict(dict)
        self._by_request: defaultdict[str, dict[int, Parked]] = defaultdict(dict)
        self._by_ticket: dict[int, ParkedItems] = {}

    def add(self, parked: Parked) -> None:
        parked.number = next(self._numbers)
        self._by_way[parked.way][parked.number] = parked
        if parked.request_id is not None:
            self._by_request[parked.request_id][parked.number] = parked
        if isinstance(parked, ParkedItems) and parked.ticket:
            self._by_ticket[parked.ticket] = parked
        for watch in parked.watches:
            watch.enter()

    def move(self, parked: Parked, before: Way) -> None:
        """It waits for another way than before."""
        self._leave(parked, before)
        self._by_way[parked.way][parked.number] = parked

    def remove(self, parked: Parked, before: Way) -> None:
        """Forget it; it waited for the way `before`."""
        self._leave(parked, before)
        if parked.request_id is not None:
            del self._by_request[parked.request_id][parked.number]
            if not self._by_request[parked.request_id]:
                del self._by_request[parked.request_id]
        if isinstance(parked, ParkedItems):
            self._by_ticket.pop(parked.ticket, None)
        for watch in parked.watches:
            watch.leave()

    @property
    def is_empty(self) -> bool:
        return not self._by_way

    def first(self, way: Way) -> Parked | None:
        """What waits longest for a way."""
        waiting = self._by_way.get(way)
        return next(iter(waiting.values())) if waiting else None

    def of_ticket(self, ticket: int) -> ParkedItems | None:
        return self._by_ticket.get(ticket)

    def of_request(self, request_id: str) -> list[Parked]:
        return list(self._by_request.get(request_id, {}).values())

    @property
    def all(self) -> list[Parked]:
        """In the order in which they came."""
        every = [parked for waiting in self._by_way.values() for parked in waiting.values()]
        return sorted(every, key=lambda parked: parked.number)

    def _leave(self, parked: Parked, way: Way) -> None:
        del self._by_way[way][parked.number]
        if not self._by_way[way]:
            del self._by_way[way]
