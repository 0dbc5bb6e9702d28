"""Converts the plain values of a YAML file to a stream graph, whose edges are written as arrows."""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise

from sagellm.graphs.diagnostics import VALUE, Diagnostic, Path, Position, position_of
from sagellm.graphs.ir import SINK, SOURCE, Edge, FrozenMap, Graph, Node, Value
from sagellm.graphs.text.tree import Tree
from sagellm.graphs.vocabulary import nearest

VERSION = 1
_OP_HINT = "add `op:` with the name of an operator, such as `op: generate`"
_REQUIRED = ("sagellm", "name", "operators", "edges")
_SECTIONS = (*_REQUIRED, "imports", "engines", "models", "budgets", "executor")
NAME = re.compile(r"[A-Za-z_](?:[A-Za-z0-9_-]*[A-Za-z0-9_])?")
_END = re.compile(rf"(?P<name>{NAME.pattern})(?:\.(?P<port>{NAME.pattern}))?")
_ARROW = re.compile(r"->|~>")


@dataclass(frozen=True, slots=True)
class ChainEnd:
    """One end of an arrow: `name`, or `name.port` with an outlet or inlet. `at`: the offset of the
    end in the text of the chain.
    """

    name: str
    port: str | None
    at: int

    @property
    def port_at(self) -> int:
        return self.at + len(self.name) + 1 if self.port else self.at


@dataclass(frozen=True, slots=True)
class ChainLink:
    """One arrow of a chain, between two ends."""

    left: ChainEnd
    right: ChainEnd
    feedback: bool

    @property
    def edge(self) -> Edge:
        outlet, inlet = self.left.port or "out", self.right.port or "in"
        return Edge(self.left.name, self.right.name, outlet, inlet, self.feedback)


@dataclass(frozen=True, slots=True)
class ChainError(Exception):
    """A chain cannot be parsed. `at`: the offset of the mistake in the text."""

    at: int
    message: str
    hint: str


def parse_chain(chain: str) -> tuple[ChainLink, ...]:
    """Parse `a -> b.inlet`, `a.outlet -> b`, `a -> b -> c`, and feedback `a ~> b`.

    Raises ChainError. A dotted name between two arrows is refused, because `b` in `a.b` could be
    the inlet of the left arrow or the outlet of the right arrow.
    """
    arrows = list(_ARROW.finditer(chain))
    if not arrows:
        raise ChainError(0, f"`{chain}` has no arrow", "write `a -> b`, or `a ~> b` for feedback")
    starts = [0, *(arrow.end() for arrow in arrows)]
    stops = [*(arrow.start() for arrow in arrows), len(chain)]
    ends = [_chain_end(chain, start, stop) for start, stop in zip(starts, stops, strict=True)]
    _refuse_middle_ports(ends)
    return tuple(
        ChainLink(left, right, arrow.group() == "~>")
        for (left, right), arrow in zip(pairwise(ends), arrows, strict=True)
    )


def _chain_end(chain: str, start: int, stop: int) -> ChainEnd:
    piece = chain[start:stop]
    at = start + len(piece) - len(piece.lstrip())
    found = _END.fullmatch(piece.strip())
    if found:
        return ChainEnd(found["name"], found["port"], at)
    if not piece.strip():
        raise ChainError(start, "an arrow with nothing beside it", "write `a -> b`")
    hint = "write `operator` or `operator.port`, and `->` or `~>` between two of them"
    raise ChainError(at, f"`{piece.strip()}` is neither an operator nor a port", hint)


def _refuse_middle_ports(ends: list[ChainEnd]) -> None:
    for before, end in pairwise(ends[:-1]):
        if end.port:
            dotted = f"{end.name}.{end.port}"
            hint = f"write two edges: `{before.name} -> {end.name}` and `{dotted} -> ...`"
            message = f"`{dotted}` between two arrows: is `{end.port}` an inlet or an outlet?"
            raise ChainError(end.port_at, message, hint)


def chains(edges: Iterable[Edge]) -> Iterator[str]:
    """The edges as the fewest chains in the same order. `parse_chain` gives the edges back."""
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


@dataclass(slots=True)
class SurfaceReader:
    """Reads the graph of one file. Call `graph()` once, then read `mistakes` and `positions`."""

    tree: Tree
    lines: list[str]
    mistakes: list[Diagnostic] = field(default_factory=list)
    edge_positions: dict[Path, Position] = field(default_factory=dict)

    @property
    def positions(self) -> dict[Path, Position]:
        """The position of each path of the graph.

        ("edges", n) is the n-th edge of the graph: a line of the file may hold several edges.
        """
        places = self.tree.positions.items()
        others = {path: at for path, at in places if path[:1] != ("edges",) or len(path) == 1}
        return others | self.edge_positions

    def graph(self) -> Graph:
        top = self._mapping((), self.tree.value)
        self._check_sections(top)
        attrs: dict[str, Value] = {}
        if "imports" in top:
            attrs["imports"] = self._imports(top["imports"])
        if "engines" in top:
            attrs["engines"] = self._named("engines", top["engines"])
        if "models" in top:
            attrs["models"] = self._named("models", top["models"])
        if "budgets" in top:
            attrs["budgets"] = self._mapping(("budgets",), top["budgets"])
        if "executor" in top:
            attrs["executor"] = self._executor(top["executor"])
        nodes = tuple(self._nodes(top.get("operators", FrozenMap())))
        edges = tuple(self._edges(top.get("edges", ())))
        name = self._text(("name",), top.get("name", ""))
        return Graph(name, "stream", nodes, edges, FrozenMap(attrs))

    def _report(self, code: str, path: Path, message: str, hint: str | None) -> None:
        at = position_of(path, self.tree.positions)
        self.mistakes.append(Diagnostic(code, path, message, hint, at))

    def _mapping(self, path: Path, value: Value) -> FrozenMap:
        if isinstance(value, FrozenMap):
            return value
        name = f"`{path[-1]}`" if path else "a graph file"
        hint = "write `name: value` entries"
        self._report("bad-form", (*path, VALUE), f"{name} must be a mapping", hint)
        return FrozenMap()

    def _text(self, path: Path, value: Value) -> str:
        if isinstance(value, str):
            return value
        self._report("bad-form", (*path, VALUE), f"`{path[-1]}` must be a text", "quote it")
        return ""

    def _check_sections(self, top: FrozenMap) -> None:
        for key in top:
            if key not in _SECTIONS:
                close = nearest(key, _SECTIONS)
                hint = f"did you mean `{close}`?" if close else f"there are {', '.join(_SECTIONS)}"
                self._report("unknown-key", (key,), f"unknown key `{key}`", hint)
        for key in _REQUIRED:
            if isinstance(self.tree.value, FrozenMap) and key not in top:
                hint = f"add `sagellm: {VERSION}`" if key == "sagellm" else f"add `{key}:`"
                self._report("missing-key", (), f"the key `{key}` is missing", hint)
        version = top.get("sagellm", VERSION)
        if version is True or version != VERSION:  # True == 1 in Python
            message = f"version {version} of the graph format is not known"
            self._report("bad-version", ("sagellm", VALUE), message, f"write `sagellm: {VERSION}`")

    def _check_name(self, path: Path) -> None:
        name = str(path[-1])
        if name in (SOURCE, SINK):
            hint = "choose another name"
            self._report("reserved-name", path, f"`{name}` is a port of every graph", hint)
        elif not NAME.fullmatch(name):
            hint = "use letters, digits, `_` and, inside the name, `-`"
            self._report("bad-name", path, f"`{name}` is no name", hint)

    def _named(self, section: str, value: Value) -> FrozenMap:
        """Read a section of `name: {option: value}` entries."""
        entries = self._mapping((section,), value)
        for name in entries:
            self._check_name((section, name))
        return FrozenMap(
            (name, self._mapping((section, name), options)) for name, options in entries.items()
        )

    def _imports(self, value: Value) -> tuple[str, ...]:
        """Read the names of modules and files. The caller decides whether to import them."""
        if not isinstance(value, tuple):
            hint = "write `imports: [my_module, my_file.py]`"
            self._report("bad-form", ("imports", VALUE), "`imports` must be a list", hint)
            return ()
        for index, name in enumerate(value):
            if not isinstance(name, str) or not name:
                message = "an import must be a text: a module or the path of a .py file"
                self._report("bad-form", ("imports", index), message, "quote it")
        return tuple(name for name in value if isinstance(name, str) and name)

    def _executor(self, value: Value) -> FrozenMap:
        executor = self._mapping(("executor",), value)
        if isinstance(value, FrozenMap) and "kind" not in executor:
            self._report(
                "missing-key", ("executor",), "the executor has no kind", "add `kind: tasks`"
            )
        return executor

    def _nodes(self, value: Value) -> Iterator[Node]:
        for name, item in self._mapping(("operators",), value).items():
            path: Path = ("operators", name)
            self._check_name(path)
            options = dict(self._mapping(path, item))
            if isinstance(item, FrozenMap) and "op" not in options:
                close = nearest("op", list(options))
                hint = f"did you mean `op` by `{close}`?" if close else _OP_HINT
                self._report("missing-key", path, f"operator `{name}` does not say its `op`", hint)
            op = self._text((*path, "op"), options.pop("op", ""))
            yield Node(name, op, FrozenMap(options))

    def _edges(self, value: Value) -> Iterator[Edge]:
        if not isinstance(value, tuple):
            hint = "write `- source -> ...` lines"
            self._report("bad-form", ("edges", VALUE), "`edges` must be a list", hint)
            return
        for index, chain in enumerate(value):
            if isinstance(chain, str):
                yield from self._chain(index, chain)
            else:
                message = "an edge must be a text such as `a -> b`"
                self._report("bad-form", ("edges", index), message, "write `- a -> b`")

    def _chain(self, index: int, chain: str) -> Iterator[Edge]:
        start = self._start(index, chain)
        try:
            links = parse_chain(chain)
        except ChainError as mistake:
            at = self._shift(start, mistake.at)
            found = Diagnostic("bad-edge", ("edges",), mistake.message, mistake.hint, at)
            self.mistakes.append(found)
            return
        for link in links:
            self._place(link, start)
            yield link.edge

    def _start(self, index: int, chain: str) -> tuple[Position, bool]:
        """The position of a chain, and whether offsets in the chain are offsets in the line.

        They differ if the YAML text escapes or folds the chain.
        """
        at = self.tree.positions["edges", index]
        column = self.lines[at.line - 1].find(chain, at.column - 1)
        if column < 0:
            return at, False
        return Position(at.file, at.line, column + 1), True

    def _shift(self, start: tuple[Position, bool], offset: int) -> Position:
        at, exact = start
        return Position(at.file, at.line, at.column + offset) if exact else at

    def _place(self, link: ChainLink, start: tuple[Position, bool]) -> None:
        number = sum(len(path) == 2 for path in self.edge_positions)
        path: Path = ("edges", number)
        ends = {"source": link.left.at, "outlet": link.left.port_at}
        ends |= {"target": link.right.at, "inlet": link.right.port_at}
        self.edge_positions[path] = self._shift(start, link.left.at)
        for name, offset in ends.items():
            self.edge_positions[*path, name] = self._shift(start, offset)
