"""The DSL: `Graph("pd") >> ops.admission() >> ...` builds a graph, which can then be opened."""

import errno
import inspect
import itertools
from collections import ChainMap
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from sagellm.errors import unopened
from sagellm.extensions import RESOLVER, import_all
from sagellm.graphs.ir import SINK, SOURCE, Edge, FrozenMap, Node, freeze
from sagellm.graphs.ir import Graph as FrozenGraph
from sagellm.graphs.text import yaml
from sagellm.graphs.text.yaml import Document
from sagellm.graphs.vocabulary import SHADOW, OpSpec, nearest
from sagellm.opening.decisions import DecisionFile
from sagellm.opening.open_graph import HOW_TO_OPEN, OpenGraph
from sagellm.opening.sources import graph_file, suggest_graph
from sagellm.runtime.registry import FUNCTIONS

_NUMBERS = itertools.count(1)  # for the symbols of functions without a unique name


@dataclass(eq=False)
class Operator:
    """An operator of a graph under construction. `a >> b` connects outlet `out` of `a` to `b`."""

    spec: OpSpec
    options: dict[str, Any]
    name: str = ""
    functions: dict[str, Callable[..., Any]] = field(default_factory=dict)
    graph: "Graph | None" = None

    def named(self, name: str) -> "Operator":
        """Name the operator, and return it. The default name is the name of its op."""
        self.name = name
        return self

    def outlet(self, name: str) -> "Outlet":
        """The outlet `name`, to connect: `split.outlet("aggregated") >> ops.generate(engine="d")`.

        Raises ValueError for an outlet that the operator does not have.
        """
        known = tuple(port.name for port in self._own_spec.outlets)
        if not self.has_outlet(name):
            close = nearest(name, known) or next(iter(known), "")
            hint = f"did you mean {close!r}?" if close else "its options name none"
            raise ValueError(f"{self.spec.name} has no outlet {name!r}; {hint}")
        return Outlet(self, name)

    def has_outlet(self, name: str) -> bool:
        return self._own_spec.outlet(name) is not None

    @property
    def _own_spec(self) -> OpSpec:
        """The spec with the outlets that follow from the operator's options."""
        return self.spec.with_options(self.options)

    def __rshift__(self, after: "Operator") -> "Operator":
        return Outlet(self, "out") >> after


@dataclass(frozen=True)
class Outlet:
    """An outlet of an operator: the left side of `>>`."""

    operator: Operator
    name: str

    def __rshift__(self, after: Operator) -> Operator:
        graph = self.operator.graph
        if graph is None:
            raise ValueError(f"{self.operator.spec.name} is in no graph yet; begin with Graph(...)")
        graph.connect(self.operator, self.name, after)
        return after


@unopened(HOW_TO_OPEN)
class Graph:
    """A stream graph, built with `>>` or loaded from YAML.

    `Graph("pd") >> a >> b` begins at `source`. An outlet `out` without an edge leads to `sink`.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.functions: dict[str, Callable[..., Any]] = {}
        self._engines: dict[str, dict[str, Any]] = {}
        self._models: dict[str, dict[str, Any]] = {}
        self._operators: list[Operator] = []
        self._edges: list[Edge] = []
        self._tail: Operator | None = None
        self._document: Document | None = None

    @classmethod
    def load(
        cls, path: str | Path, functions: Mapping[str, Callable[..., Any]] | None = None
    ) -> "Graph":
        """Read a YAML file, or a shipped graph by its name, and import the modules of its key
        `imports`. A str with the name of a shipped graph (`pd`) means that graph, even if there is
        a file of this name; a `Path` always means a file. `functions` win over registered functions
        of the same name.

        Raises GraphError for mistakes in the file, and FileNotFoundError, which names the shipped
        graphs.
        """
        file = graph_file(path)
        if not file.exists():
            raise _no_graph(path)
        document = yaml.load_file(file)
        import_all(document, file.parent)
        graph = cls(document.graph.name)
        graph._document = document
        graph.functions.update(functions or {})
        return graph

    def engine(self, name: str, **options: Any) -> "Graph":
        """Add an engine: `graph.engine("p", model="sage-tiny", replicas=2)`."""
        self._refuse_loaded()
        self._engines[name] = options
        return self

    def model(self, key: str, /, **options: Any) -> "Graph":
        """Set options of a model: `graph.model("small", aliases=["tiny"], max_model_len=512)`.
        `key` is the outlet of `ops.route_model` for that model.
        """
        self._refuse_loaded()
        self._models[key] = options
        return self

    def __rshift__(self, after: Operator) -> "Graph":
        """Append an operator to the chain that begins at `source`."""
        if self._tail is None:
            self.connect(None, "out", after)
        else:
            self.connect(self._tail, "out", after)
        self._tail = after
        return self

    def connect(self, before: Operator | None, outlet: str, after: Operator) -> None:
        """Add an edge from an outlet of `before` to `after`. `before` None means `source`.

        Adds the operator `after` to the graph if it is new. Raises ValueError for a taken name and
        for an operator of another graph, TypeError for a value that is no operator.
        """
        self._refuse_loaded()
        self._adopt(after)
        self._edges.append(Edge(before.name if before else SOURCE, after.name, outlet))

    @property
    def ir(self) -> FrozenGraph:
        """The frozen graph."""
        if self._document is not None:
            return self._document.graph
        attrs: dict[str, object] = {"engines": self._engines, "executor": {"kind": "tasks"}}
        if self._models:
            attrs["models"] = self._models
        frozen = freeze(attrs)
        assert isinstance(frozen, FrozenMap)
        nodes = tuple(
            Node(operator.name, operator.spec.name, FrozenMap()).with_attrs(**operator.options)
            for operator in self._operators
        )
        return FrozenGraph(self.name, "stream", nodes, self._all_edges(), frozen)

    @property
    def document(self) -> Document:
        """The graph, with source positions if it was read from a file."""
        return self._document or Document(self.ir, {})

    def open(
        self,
        *,
        set: Mapping[str, Any] | None = None,
        model: str | None = None,
        executor: str | None = None,
        seed: int = 0,
        decisions: Path | str | None = None,
    ) -> OpenGraph:
        """Open the graph: `async with` under trio or asyncio, `with` in a plain thread.

        `set` overrides options (`{"split.min_uncached_tokens": 8}`). `model` replaces the model of
        every engine. `executor` is `tasks` (all in this process) or `processes` (a worker process
        for each replica of each engine). `decisions` names the file of a decision log, which
        `sagellm replay` reads. Entering the result raises GraphError before any model is loaded.
        """
        chosen = {} if executor is None else {"executor.kind": executor}
        opening = OpenGraph(
            self.document,
            resolver=RESOLVER,
            # A live view: functions may still be registered before the graph is entered.
            functions=ChainMap(self.functions, FUNCTIONS),  # type: ignore[arg-type]
            overrides={**chosen, **(set or {})},
            model=model,
            seed=seed,
        )
        if decisions is not None:
            opening.record_to(DecisionFile(Path(decisions)))
        return opening

    def serve(self, **options: Any) -> None:
        """Open the graph and serve it over HTTP until SIGTERM or Ctrl-C: `graph.serve(port=8000)`.

        See `sagellm.serve` for the options, and `open(...).serve(...)` for those of `open`.
        """
        self.open().serve(**options)

    async def serve_async(self, **options: Any) -> None:
        """Serve like `serve`, under trio: `url = await nursery.start(graph.serve_async)`."""
        await self.open().serve_async(**options)

    def _refuse_loaded(self) -> None:
        if self._document is not None:
            raise ValueError(f"graph {self.name} was read from a file; change it by open(set=...)")

    def _adopt(self, operator: Operator) -> None:
        if not isinstance(operator, Operator):
            what = "ops.map(function)" if callable(operator) else "an operator of sagellm.ops"
            raise TypeError(f"{operator!r:.80} is no operator of a graph: write {what}")
        if operator.graph is self:
            return
        if operator.graph is not None:
            raise ValueError(f"{operator.name} belongs to graph {operator.graph.name!r} already")
        operator.graph = self
        operator.name = self._free_name(operator)
        self._operators.append(operator)
        self.functions.update(operator.functions)

    def _free_name(self, operator: Operator) -> str:
        taken = {other.name for other in self._operators}
        name = operator.name or operator.spec.name
        if operator.name and name in taken:
            raise ValueError(f"two operators are named {name!r}; choose another name")
        number = 2
        while name in taken:
            name = f"{operator.spec.name}_{number}"
            number += 1
        return name

    def _all_edges(self) -> tuple[Edge, ...]:
        # An outlet `out` without an edge leads to `sink`.
        left = {(edge.source, edge.outlet) for edge in self._edges}
        ends = [
            Edge(operator.name, SINK)
            for operator in self._operators
            if operator.has_outlet("out") and (operator.name, "out") not in left
        ]
        return (*self._edges, *ends)


def operator(op: str, *args: Any, **options: Any) -> Operator:
    """Create an operator. Positional values are its options, in the order of their declaration.

    An option may be a function. The graph stores a symbol for the function: its registered name, or
    else its qualified name. The symbol of a lambda or a callable object has a number, and cannot be
    written to YAML. Raises TypeError for an unknown option.
    """
    spec = RESOLVER.operator(op).spec
    names = [option.name for option in fields(spec.options)]
    if len(args) > len(names):
        raise TypeError(f"{op} takes {len(names)} options at the most")
    given = {**dict(zip(names, args, strict=False)), **options}
    known = [*names, SHADOW] if spec.decides else names
    for name in given:
        if name not in known:
            raise TypeError(f"{op} has no option {name!r}; did you mean {nearest(name, known)!r}?")
    functions = {}  # symbol -> function; the options hold symbols, which YAML can hold
    for name, value in given.items():
        if callable(value):
            given[name] = symbol = _symbol(value)
            functions[symbol] = value
    return Operator(spec, given, functions=functions)


def _symbol(function: Callable[..., Any]) -> str:
    """The symbol of a function in a graph: its registered name, or else its qualified name.

    Two lambdas of one line have the same qualified name, so lambdas and the like get a number too.
    """
    for known, registered in FUNCTIONS.at_hand.items():  # `items()` would import entry points
        if registered is function:
            return known
    module = getattr(function, "__module__", "") or ""
    name = getattr(function, "__qualname__", type(function).__qualname__)
    is_plain = inspect.isfunction(function) and "<" not in name and not _is_wrapper(function)
    if not is_plain:  # a lambda, a closure, a bound method, a callable object
        name = f"{name}.{next(_NUMBERS)}"
    return f"{module}.{name}"


def _is_wrapper(function: Callable[..., Any]) -> bool:
    return hasattr(function, "__wrapped__")


def _no_graph(path: str | Path) -> FileNotFoundError:
    """The error for a graph that does not exist; it names the closest or all shipped graphs."""
    return FileNotFoundError(errno.ENOENT, f"no such graph ({suggest_graph(str(path))})", str(path))
