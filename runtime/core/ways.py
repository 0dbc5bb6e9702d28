"""Which way offered items go: learned as they are refused, so that nothing is tried in vain."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from sagellm.graphs.ir import Graph
from sagellm.runtime.core.journal import Cell
from sagellm.runtime.messages import Item, Request


class _Way(NamedTuple):
    """An item was refused by the service operator `node`; `states` is what its way depended on."""

    node: str
    item: Item
    states: tuple[Any, ...]


class Ways:
    """Knows where an offered request would be refused, as long as nothing changes its way: neither
    the request nor the state of an operator with several outlets.
    """

    def __init__(self, graph: Graph, cells: Mapping[str, Cell]) -> None:
        outlets = {name: {edge.outlet for edge in graph.outputs(name)} for name in cells}
        self._branching = tuple(cell for name, cell in cells.items() if len(outlets[name]) > 1)
        self._states: tuple[Any, ...] = tuple(cell.state for cell in self._branching)
        self._ways: dict[str, dict[int, _Way]] = {}

    def remember(self, item: Item, node: str, states: tuple[Any, ...]) -> None:
        """A service operator has refused an item; `states` were those of that moment."""
        if isinstance(item, Request):
            way = _Way(node, item, states)
            self._ways.setdefault(item.request_id, {})[item.choice] = way

    @property
    def states(self) -> tuple[Any, ...]:
        """What ways depend on now: the same object for as long as none of it changes."""
        for cell, state in zip(self._branching, self._states, strict=True):
            if cell.state is not state:
                self._states = tuple([cell.state for cell in self._branching])
                break
        return self._states

    def find(self, item: Item, states: tuple[Any, ...]) -> str | None:
        """The operator that has refused an item and that it would go to again, if any is known;
        `states` are those of now.
        """
        choices = self._ways.get(item.request_id)
        way = choices.get(item.choice) if choices is not None else None
        if way is None or way[1] is not item or way[2] is not states:
            return None
        return way[0]

    def forget(self, request_id: str) -> None:
        """A request has ended, or was taken."""
        self._ways.pop(request_id, None)
