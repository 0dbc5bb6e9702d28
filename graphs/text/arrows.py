"""Edges as text: `a -> b.inlet`, `a.outlet -> b`, chains `a -> b -> c`, feedback `a ~> b`."""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise

from sagellm.graphs.ir import Edge

NAME = re.compile(r"[A-Za-z_](?:[A-Za-z0-9_-]*[A-Za-z0-9_])?")
_END = re.compile(rf"(?P<name>{NAME.pattern})(?:\.(?P<port>{NAME.pattern}))?")
_ARROW = re.compile(r"->|~>")


@dataclass(frozen=True, slots=True)
class End:
    """One end of an arrow, `name` or `name.port`, and where each starts in the text."""

    name: str
    port: str | None
    at: int

    @property
    def port_at(self) -> int:
        return self.at + len(self.name) + 1 if self.port else self.at


@dataclass(frozen=True, slots=True)
class Link:
    """One arrow of a chain, with its ends."""

    left: End
    right: End
    feedback: bool

    @property
    def edge(self) -> Edge:
        outlet, inlet = self.left.port or "out", self.right.port or "in"
        return Edge(self.left.name, self.right.name, outlet, inlet, self.feedback)


@dataclass(frozen=True, slots=True)
class ArrowMistake(Exception):
    """A chain that cannot be read: where in its text, what, and how to fix it."""

    at: int
    message: str
    hint: str


def parse(chain: str) -> tuple[Link, ...]:
    """The links of a chain. Raises ArrowMistake.

    A dotted name is an outlet left of an arrow and an inlet right of it, so between two arrows
    it is refused: it could be either.
    """
    arrows = list(_ARROW.finditer(chain))
    if not arrows:
        raise ArrowMistake(0, f"`{chain}` has no arrow", "write `a -> b`, or `a ~> b` for feedback")
    starts = [0, *(arrow.end() for arrow in arrows)]
    stops = [*(arrow.start() for arrow in arrows), len(chain)]
    ends = [_end(chain, start, stop) for start, stop in zip(starts, stops, strict=True)]
    _refuse_middle_ports(ends)
    return tuple(
        Link(left, right, arrow.group() == "~>")
        for (left, right), arrow in zip(pairwise(ends), arrows, strict=True)
    )


def _end(chain: str, start: int, stop: int) -> End:
    piece = chain[start:stop]
    at = start + len(piece) - len(piece.lstrip())
    found = _END.fullmatch(piece.strip())
    if found:
        return End(found["name"], found["port"], at)
    if not piece.strip():
        raise ArrowMistake(start, "an arrow with nothing beside it", "write `a -> b`")
    hint = "write `operator` or `operator.port`, and `->` or `~>` between two of them"
    raise ArrowMistake(at, f"`{piece.strip()}` is neither an operator nor a port", hint)


def _refuse_middle_ports(ends: list[End]) -> None:
    for before, end in pairwise(ends[:-1]):
        if end.port:
            dotted = f"{end.name}.{end.port}"
            hint = f"write two edges: `{before.name} -> {end.name}` and `{dotted} -> ...`"
            message = f"`{dotted}` between two arrows: is `{end.port}` an inlet or an outlet?"
            raise ArrowMistake(end.port_at, message, hint)


def chains(edges: Iterable[Edge]) -> Iterator[str]:
    """The edges as the fewest chains that keep their order; `parse` gives the same edges."""
    text, last = "", None
    for edge in edges:
        if last is not None and _continues(last, edge):
            text += str(edge)[len(edge.source) :]
        else:
            if text:
                yield text
            text = str(edge)
        last = edge
    if text:
        yield text


def _continues(last: Edge, edge: Edge) -> bool:
    plain = last.inlet == "in" and edge.outlet == "out" and last.feedback == edge.feedback
    return plain and last.target == edge.source
