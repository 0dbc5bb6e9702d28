"""Which way offered items go: learned as they are refused, so that nothing is tried in vain."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from sagellm.graphs.ir import Graph
from sagellm.runtime.core.journal import Cell
from sagellm.runtime.messages import Item, Request


class _Way(NamedTuple):
    """An item was refused by the service operator `node`; what its way there depended on."""

    node: str
    epoch: int
    num_cached_tokens: int
    states: tuple[Any, ...]


class Ways:
    """Knows where an offered request would be refused, as long as nothing changes its way: neither
    the request nor the state of an operator with several outlets.
    """

    def __init__(self, graph: Graph, cells: Mapping[str, Cell]) -> None:
        outlets = {name: {edge.outlet for edge in graph.outputs(name)} for name in cells}
        self._branching = tuple(cell for name, cell in cells.items() if len(outlets[name]) > 1)
        self._ways: dict[str, dict[int, _Way]] = {}

    def remember(self, item: Item, node: str) -> None:
        """A service operator has refused an item."""
        if isinstance(item, Request):
            states = tuple(cell.state for cell in self._branching)
            way = _Way(node, item.epoch, item.num_cached_tokens, states)
            self._ways.setdefault(item.request_id, {})[item.choice] = way

    def find(self, item: Item) -> str | None:
        """The operator that has refused an item and that it would go to again, if any is known."""
        choices = self._ways.get(item.request_id)
        way = choices.get(item.choice) if choices is not None else None
        if way is None or not isinstance(item, Request):
            return None
        if (way.epoch, way.num_cached_tokens) != (item.epoch, item.num_cached_tokens):
            return None
        for cell, state in zip(self._branching, way.states, strict=True):
            if cell.state is not state:
                return None
        return way.node

    def forget(self, request_id: str) -> None:
        """A request has ended, or was taken."""
        self._ways.pop(request_id, None)
