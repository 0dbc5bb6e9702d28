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
        """What the operator of that node declares; None for `source`, `sink` and unknown names."""
        for node in self.graph.nodes:
            if node.name == name:
                return self._spec_of(node)
        return None

    @property
    def specified(self) -> Iterator[tuple[Node, OpSpec]]:
        """The nodes whose op is known."""
        for node in self.graph.nodes:
            spec = self._spec_of(node)
            if spec is not None:
                yield node, spec

    def _spec_of(self, node: Node) -> OpSpec | None:
        spec = self.vocabulary.get(node.op)
        return spec.with_options(node.attrs) if spec else None

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
