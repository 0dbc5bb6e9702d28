"""What a rule looks at, and the questions that several rules ask of it."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TypeAlias

from sagellm.graphs.diagnostics import Diagnostic
from sagellm.graphs.facts import Facts
from sagellm.graphs.ir import Edge, Graph, Node
from sagellm.graphs.vocabulary import OpSpec, Vocabulary, nearest


@dataclass(frozen=True, slots=True)
class Subject:
    """A stream graph under check."""

    graph: Graph
    vocabulary: Vocabulary
    facts: Facts

    def spec(self, name: str) -> OpSpec | None:
        """What the op of that node declares; None for `source`, `sink` and unknown names."""
        for node in self.graph.nodes:
            if node.name == name:
                return self.vocabulary.get(node.op)
        return None

    @property
    def specified(self) -> Iterator[tuple[Node, OpSpec]]:
        """The nodes whose op is known."""
        for node in self.graph.nodes:
            spec = self.vocabulary.get(node.op)
            if spec is not None:
                yield node, spec

    @property
    def forward(self) -> Iterator[tuple[int, Edge]]:
        """The numbered edges that items travel along downstream."""
        return ((n, edge) for n, edge in enumerate(self.graph.edges) if not edge.feedback)

    def engine_of(self, node: Node, spec: OpSpec) -> str | None:
        """The engine that a node refers to, if it does and the graph has it."""
        name = node.attrs.get("engine")
        return (
            name if spec.engine and isinstance(name, str) and name in self.graph.engines else None
        )


Rule: TypeAlias = Callable[[Subject], Iterator[Diagnostic]]


def choice(name: object, known: Iterable[str]) -> str:
    """A hint: the known name that was probably meant, or all there are."""
    names = sorted(known)
    close = nearest(str(name), names)
    if close is not None:
        return f"did you mean `{close}`?"
    return f"there are {', '.join(names)}" if names else "there are none"


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
