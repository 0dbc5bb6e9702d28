"""The queues for credit: parked inputs and items, holds for one replica, and refused offers."""

import heapq
import math
from collections import defaultdict
from collections.abc import Container, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import count
from operator import is_
from typing import Any, NamedTuple, TypeAlias

import msgspec

from sagellm.graphs.ir import Graph
from sagellm.runtime.core.accounting import Stopwatch
from sagellm.runtime.core.credit import CreditGate, Gates
from sagellm.runtime.core.journal import LogicCell
from sagellm.runtime.messages import Item, Prefilled, Request
from sagellm.runtime.operator import Arrival, Input


class BlockedAt(NamedTuple):
    """A service operator without credit: at one replica, or with None at every replica."""

    node: str
    replica: int | None


_NOT_TRIED = BlockedAt("", None)


@dataclass(slots=True, eq=False)
class ParkedInput:
    """An undone input of a logic operator: it led to an item without credit at `blocked_at`."""

    node: str
    happened: Input
    blocked_at: BlockedAt
    watches: list[Stopwatch]  # run while the input waits
    number: int = 0  # its place in the order of all entries

    @property
    def request_id(self) -> str | None:
        """The request that waits; None if the input is not the arrival of a request."""
        item = self.happened.item if isinstance(self.happened, Arrival) else None
        return item.request_id if isinstance(item, Request) else None


@dataclass(slots=True, eq=False)
class ParkedItems:
    """Items from the source or a service operator; the first has no credit at `blocked_at`.

    `request_id`: the request of which all items are choices; None if the items are no requests.
    """

    ticket: int
    source: str
    replica: int
    items: tuple[Item, ...]
    outlet: str
    request_id: str | None
    blocked_at: BlockedAt = _NOT_TRIED
    watches: list[Stopwatch] = field(default_factory=list)
    number: int = 0


ParkedEntry: TypeAlias = ParkedInput | ParkedItems


class Parking:
    """All parked entries: by the gate that blocks them, in order; by request; and by ticket."""

    def __init__(self) -> None:
        self._numbers = count(1)
        self._by_gate: defaultdict[BlockedAt, dict[int, ParkedEntry]] = defaultdict(dict)
        self._by_request: defaultdict[str, dict[int, ParkedEntry]] = defaultdict(dict)
        self._by_ticket: dict[int, ParkedItems] = {}

    def add(self, parked: ParkedEntry) -> None:
        """Park an entry and start its stopwatches."""
        parked.number = next(self._numbers)
        self._by_gate[parked.blocked_at][parked.number] = parked
        if parked.request_id is not None:
            self._by_request[parked.request_id][parked.number] = parked
        if isinstance(parked, ParkedItems) and parked.ticket:
            self._by_ticket[parked.ticket] = parked
        for watch in parked.watches:
            watch.enter()

    def move(self, parked: ParkedEntry, before: BlockedAt) -> None:
        """Move an entry from the gate `before` to its new gate `parked.blocked_at`."""
        self._leave(parked, before)
        self._by_gate[parked.blocked_at][parked.number] = parked

    def remove(self, parked: ParkedEntry, before: BlockedAt) -> None:
        """Remove an entry from the gate `before`, and stop its stopwatches."""
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
        return not self._by_gate

    def first(self, blocked_at: BlockedAt) -> ParkedEntry | None:
        """The entry that has waited longest at a gate."""
        waiting = self._by_gate.get(blocked_at)
        return next(iter(waiting.values())) if waiting else None

    def of_ticket(self, ticket: int) -> ParkedItems | None:
        return self._by_ticket.get(ticket)

    def of_request(self, request_id: str) -> list[ParkedEntry]:
        return list(self._by_request.get(request_id, {}).values())

    @property
    def all(self) -> list[ParkedEntry]:
        """All entries in the order in which they were parked."""
        every = [parked for waiting in self._by_gate.values() for parked in waiting.values()]
        return sorted(every, key=lambda parked: parked.number)

    def _leave(self, parked: ParkedEntry, gate: BlockedAt) -> None:
        del self._by_gate[gate][parked.number]
        if not self._by_gate[gate]:
            del self._by_gate[gate]


_HoldKey: TypeAlias = tuple[str, int, int]  # an operator, a choice, and an epoch of the request


@dataclass(slots=True)
class _Hold:
    request_id: str
    until_s: float
    gate: CreditGate  # the replica that the request waits for now
    is_over: bool = False


@dataclass(slots=True)
class Holds:
    """Requests that wait a limited time for one replica, although other replicas have room.

    An operator holds a request back at most once; the time counts from the first try. A hold is
    remembered until the request ends, so that a retried request gets no second hold.
    """

    _by_request: dict[str, dict[_HoldKey, _Hold]] = field(default_factory=dict)
    _ends: list[tuple[float, int, _Hold]] = field(default_factory=list)
    _num_holds: int = 0
    has_changed: bool = False  # whether the next end may have changed since it was read

    def holds(self, node: str, item: Item, gate: CreditGate, limit_s: float, now: float) -> bool:
        """Whether operator `node` still holds an item back for `gate`.

        The first call for an item begins its hold, which lasts up to `limit_s` seconds.
        """
        if not isinstance(item, Request):
            return False
        known = self._by_request.setdefault(item.request_id, {})
        key = node, item.choice, item.epoch
        hold = known.get(key)
        if hold is None:
            hold = known[key] = _Hold(item.request_id, now + limit_s, gate)
            self._num_holds += 1
            heapq.heappush(self._ends, (hold.until_s, self._num_holds, hold))
            self.has_changed = True
        hold.gate = gate  # the latest gate: the input is parked there
        return now < hold.until_s and not hold.is_over

    def forget(self, request_id: str) -> None:
        """Drop the holds of a request that has ended."""
        if request_id in self._by_request:
            for hold in self._by_request.pop(request_id).values():
                hold.is_over = True

    @property
    def next_end_s(self) -> float:
        """The time at which the first hold ends; infinite without holds."""
        self.has_changed = False
        while self._ends and self._ends[0][2].is_over:
            heapq.heappop(self._ends)
        return self._ends[0][0] if self._ends else math.inf

    def take_due(self, now: float) -> dict[CreditGate, list[str]]:
        """End the holds that are due. Returns their requests by the gate where they waited."""
        due: dict[CreditGate, list[str]] = {}
        while self._ends and self._ends[0][0] <= now:
            hold = heapq.heappop(self._ends)[2]
            if not hold.is_over:
                hold.is_over = True
                due.setdefault(hold.gate, []).append(hold.request_id)
        return due


class _Refusal(msgspec.Struct, frozen=True, gc=False):
    """The service operator `node` refused an item.

    `states`: the states of branching operators at that time, which led the item to `node`.
    """

    node: str
    item: Item
    states: tuple[Any, ...]


class RefusalCache:
    """Remembers which service operator refused each offered request, to skip hopeless tries.

    A refusal is valid until the state of an operator with several outlets changes: until then, the
    request would go to the same service operator again.
    """

    def __init__(self, graph: Graph, cells: Mapping[str, LogicCell], gates: Gates) -> None:
        self._gates = gates
        self._entrances = {name: entrances(graph, cells, name) for name in cells}
        outlets = {name: {edge.outlet for edge in graph.outputs(name)} for name in cells}
        self._branching = tuple(cell for name, cell in cells.items() if len(outlets[name]) > 1)
        self._states: tuple[Any, ...] = tuple(cell.state for cell in self._branching)
        # By id(item), which hashes fast; a refusal keeps its item alive, so no id is used again.
        self._refusals: dict[int, _Refusal] = {}
        self._by_request: dict[str, set[int]] = {}  # the keys of `_refusals`

    def remember(self, item: Item, node: str) -> None:
        """Record that service operator `node` refused an item that `worth_trying` had yielded."""
        if isinstance(item, Request):
            self._refusals[id(item)] = _Refusal(node, item, self._states)
            self._by_request.setdefault(item.request_id, set()).add(id(item))

    def worth_trying(self, node: str, items: tuple[Item, ...]) -> Iterator[Item]:
        """The items offered by `node` that a service operator might take now.

        For an item with a valid refusal, only the operator that refused it is asked. Operator
        states must not change while the caller iterates.
        """
        refusals, states, gates = self._refusals, self._states_now(), self._gates
        entered = self._entrances[node]
        full = ""  # the latest operator found without room for any request
        for item in items:
            refusal = refusals.get(id(item))
            if refusal is None or refusal.states is not states:
                if gates.may_take_at_any(entered, item):
                    yield item
            elif refusal.node == full:
                continue
            elif gates.may_take(refusal.node, item):
                yield item
            elif gates.is_full(refusal.node):
                full = refusal.node

    def _states_now(self) -> tuple[Any, ...]:
        """The states of operators with several outlets.

        The same tuple object is returned until a state changes, so that tuples compare by identity.
        """
        states = [cell.state for cell in self._branching]
        if not all(map(is_, states, self._states)):
            self._states = tuple(states)
        return self._states

    def forget(self, request_id: str) -> None:
        """Drop the refusals of a request that has ended."""
        for key in self._by_request.pop(request_id, ()):
            del self._refusals[key]


def replica_for(item: Item, node: str, num_replicas: int) -> int:
    """The replica of `node` that a router chose for an item, or the only replica.

    Raises LookupError if there are several replicas and no router chose one.
    """
    if num_replicas == 1:
        return 0
    request = item.request if isinstance(item, Prefilled) else item
    if isinstance(request, Request) and node in request.placement:
        return request.placement[node]
    raise LookupError(f"{node} has {num_replicas} replicas and no route chose one")


def entrances(graph: Graph, cells: Container[str], start: str) -> tuple[str, ...]:
    """The service operators and sink that items of `start` reach through logic operators only."""
    found: dict[str, None] = {}
    level = [start]
    for node in level:  # grows while it is read: breadth first
        for edge in graph.outputs(node):
            if edge.feedback or edge.target in level:
                continue
            if edge.target in cells:
                level.append(edge.target)
            else:
                found[edge.target] = None
    return tuple(found)
