"""Inputs and items that wait for credit, requests held back, and refused offers."""

import heapq
import math
from collections import defaultdict
from collections.abc import Container, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import count
from operator import is_
from typing import Any, TypeAlias

import msgspec

from sagellm.graphs.ir import Graph
from sagellm.runtime.core.accounting import Stopwatch
from sagellm.runtime.core.credit import Gates
from sagellm.runtime.core.journal import LogicCell
from sagellm.runtime.messages import Item, Prefilled, Request
from sagellm.runtime.operator import Arrival, Input

BlockedAt: TypeAlias = tuple[str, int | None]  # a service operator, and one replica or any of them


@dataclass(slots=True, eq=False)
class ParkedInput:
    """An input of a logic operator. What it leads to finds no credit at `way`."""

    node: str
    happened: Input
    way: BlockedAt
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
    way: BlockedAt = ("", None)
    watches: list[Stopwatch] = field(default_factory=list)
    number: int = 0


ParkedEntry: TypeAlias = ParkedInput | ParkedItems


class Parking:
    """All that is parked: by what it waits for, in order, by request and by ticket."""

    def __init__(self) -> None:
        self._numbers = count(1)
        self._by_way: defaultdict[BlockedAt, dict[int, ParkedEntry]] = defaultdict(dict)
        self._by_request: defaultdict[str, dict[int, ParkedEntry]] = defaultdict(dict)
        self._by_ticket: dict[int, ParkedItems] = {}

    def add(self, parked: ParkedEntry) -> None:
        parked.number = next(self._numbers)
        self._by_way[parked.way][parked.number] = parked
        if parked.request_id is not None:
            self._by_request[parked.request_id][parked.number] = parked
        if isinstance(parked, ParkedItems) and parked.ticket:
            self._by_ticket[parked.ticket] = parked
        for watch in parked.watches:
            watch.enter()

    def move(self, parked: ParkedEntry, before: BlockedAt) -> None:
        """It waits for another way than before."""
        self._leave(parked, before)
        self._by_way[parked.way][parked.number] = parked

    def remove(self, parked: ParkedEntry, before: BlockedAt) -> None:
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

    def first(self, way: BlockedAt) -> ParkedEntry | None:
        """What waits longest for a way."""
        waiting = self._by_way.get(way)
        return next(iter(waiting.values())) if waiting else None

    def of_ticket(self, ticket: int) -> ParkedItems | None:
        return self._by_ticket.get(ticket)

    def of_request(self, request_id: str) -> list[ParkedEntry]:
        return list(self._by_request.get(request_id, {}).values())

    @property
    def all(self) -> list[ParkedEntry]:
        """In the order in which they came."""
        every = [parked for waiting in self._by_way.values() for parked in waiting.values()]
        return sorted(every, key=lambda parked: parked.number)

    def _leave(self, parked: ParkedEntry, way: BlockedAt) -> None:
        del self._by_way[way][parked.number]
        if not self._by_way[way]:
            del self._by_way[way]


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


class _Refusal(msgspec.Struct, frozen=True, gc=False):
    """An item was refused by the service operator `node`; `states` is what its way depended on."""

    node: str
    item: Item
    states: tuple[Any, ...]


class RefusalCache:
    """Knows where an offered request would be refused, as long as nothing changes its way: neither
    the request nor the state of an operator with several outlets.
    """

    def __init__(self, graph: Graph, cells: Mapping[str, LogicCell], gates: Gates) -> None:
        self._gates = gates
        self._entrances = {name: entrances(graph, cells, name) for name in cells}
        outlets = {name: {edge.outlet for edge in graph.outputs(name)} for name in cells}
        self._branching = tuple(cell for name, cell in cells.items() if len(outlets[name]) > 1)
        self._states: tuple[Any, ...] = tuple(cell.state for cell in self._branching)
        self._refusals: dict[int, _Refusal] = {}  # by the identity of the item, which a way keeps
        self._of_request: dict[str, set[int]] = {}  # the keys of these, by request

    def remember(self, item: Item, node: str) -> None:
        """A service operator has refused an item that was worth trying; nothing has changed."""
        if isinstance(item, Request):
            self._refusals[id(item)] = _Refusal(node, item, self._states)
            self._of_request.setdefault(item.request_id, set()).add(id(item))

    def worth_trying(self, node: str, items: tuple[Item, ...]) -> Iterator[Item]:
        """The items of `node` that a service operator might take: the one that refused an item
        before and that it would go to again, or any at all. Nothing may change meanwhile.
        """
        ways, states, gates = self._refusals, self._states_now(), self._gates
        entrances = self._entrances[node]
        full = ""  # an operator that has no room for any request
        for item in items:
            way = ways.get(id(item))
            if way is None or way.states is not states:
                if gates.may_take_at_any(entrances, item):
                    yield item
            elif way.node == full:
                continue
            elif gates.may_take(way.node, item):
                yield item
            elif gates.is_full(way.node):
                full = way.node

    def _states_now(self) -> tuple[Any, ...]:
        """What ways depend on now: the same object for as long as none of it changes."""
        states = [cell.state for cell in self._branching]
        if not all(map(is_, states, self._states)):
            self._states = tuple(states)
        return self._states

    def forget(self, request_id: str) -> None:
        """A request has ended, or was taken."""
        for key in self._of_request.pop(request_id, ()):
            del self._refusals[key]


def replica_for(item: Item, node: str, num_replicas: int) -> int:
    """The replica that the router placed an item on; the only one where there is one."""
    if num_replicas == 1:
        return 0
    request = item.request if isinstance(item, Prefilled) else item
    if isinstance(request, Request) and node in request.placement:
        return request.placement[node]
    raise LookupError(f"{node} has {num_replicas} replicas and no route chose one")


def entrances(graph: Graph, cells: Container[str], start: str) -> tuple[str, ...]:
    """The service operators, and the sink, that items of `start` reach through logic operators."""
    found: dict[str, None] = {}
    level = [start]
    for node in level:
        for edge in graph.outputs(node):
            if edge.feedback or edge.target in level:
                continue
            if edge.target in cells:
                level.append(edge.target)
            else:
                found[edge.target] = None
    return tuple(found)
