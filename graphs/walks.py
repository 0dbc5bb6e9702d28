"""Walks along the forward edges of a graph."""

from collections.abc import Iterable

from sagellm.graphs.ir import Graph


def reached(graph: Graph, start: str, avoiding: Iterable[str] = ()) -> set[str]:
    """All that forward edges lead to from `start`, itself included, not through `avoiding`."""
    successors: dict[str, list[str]] = {}
    for edge in graph.edges:
        if not edge.feedback:
            successors.setdefault(edge.source, []).append(edge.target)
    found, closed, waiting = {start}, set(avoiding), [start]
    while waiting:
        new = set(successors.get(waiting.pop(), ())) - found - closed
        found |= new
        waiting += new
    return found
