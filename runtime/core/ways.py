"""Which way offered items go: learned as they are refused, so that nothing is tried in vain."""

from collections.abc import Container, Iterator, Mapping
from operator import is_
from typing import Any

import msgspec

from sagellm.graphs.ir import Graph
from sagellm.runtime.core.credit import Gates
from sagellm.runtime.core.journal import Cell
from sagellm.runtime.messages import Item, Prefilled, Request


class _Way(msgspec.Struct, frozen=True, gc=False):
    """An item was refused by the service operator `node`; `states` is what its way depended on."""

    node: str
    item: Item
    states: tuple[Any, ...]


class Ways:
    """Knows where an offered request would be refused, as long as nothing changes its way: neither
    the request nor the state of an operator with several outlets.
    """

    def __init__(self, graph: Graph, cells: Mapping[str, Cell], gates: Gates) -> None:
        self._gates = gates
        self._entrances = {name: entrances(graph, cells, name) for name in cells}
        outlets = {name: {edge.outlet for edge in graph.outputs(name)} for name in cells}
        self._branching = tuple(cell for name, cell in cells.items() if len(outlets[name]) > 1)
        self._states: tuple[Any, ...] = tuple(cell.state for cell in self._branching)
        self._ways: dict[int, _Way] = {}  # by the identity of the item, which a way keeps
        self._of_request: dict[str, set[int]] = {}  # the keys of these, by request

    def remember(self, item: Item, node: str) -> None:
        """A service operator has refused an item that was worth trying; nothing has changed."""
        if isinstance(item, Request):
            self._ways[id(item)] = _Way(node, item, self._states)
            self._of_request.setdefault(item.request_id, set()).add(id(item))

    def worth_trying(self, node: str, items: tuple[Item, ...]) -> Iterator[Item]:
        """The items of `node` that a service operator might take: the one that refused an item
        before and that it would go to again, or any at all. Nothing may change meanwhile.
        """
        ways, states, gates = self._ways, self._states_now(), self._gates
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
            del self._ways[key]


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
