"""Passes over graphs, and the pipeline that applies them in order."""

from collections.abc import Sequence
from typing import Protocol

from sagellm.graphs.ir import Graph
from sagellm.graphs.passes.fusion import KERNEL_PASSES
from sagellm.graphs.passes.placement import PlaceLayers
from sagellm.graphs.vocabulary import nearest

__all__ = ["KERNEL_PASSES", "Pass", "PlaceLayers", "UnknownPass", "run_pipeline"]


class Pass(Protocol):
    """A transformation of graphs that keeps their meaning: a frozen dataclass."""

    @property
    def name(self) -> str: ...

    def apply(self, graph: Graph) -> Graph: ...


class UnknownPass(ValueError):
    """`stop_after` names no pass of the pipeline."""


def run_pipeline(graph: Graph, passes: Sequence[Pass], *, stop_after: str | None = None) -> Graph:
    """Apply the passes in order, up to and including the pass `stop_after`. Raises UnknownPass."""
    names = [step.name for step in passes]
    if stop_after is not None and stop_after not in names:
        close = nearest(stop_after, names)
        hint = f"did you mean {close!r}?" if close else f"there are {', '.join(names)}"
        raise UnknownPass(f"no pass {stop_after!r}; {hint}")
    for step in passes:
        graph = step.apply(graph)
        if step.name == stop_after:
            break
    return graph
