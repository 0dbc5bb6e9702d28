"""Loads and dumps stream graphs in their YAML form."""

import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path as FilePath

from sagellm.graphs.diagnostics import Diagnostic, GraphError, Path, Position, locate
from sagellm.graphs.ir import SINK, SOURCE, FrozenMap, Graph, Node, Value
from sagellm.graphs.text.surface import NAME, VERSION, SurfaceReader, chains
from sagellm.graphs.text.tree import MAX_CHARACTERS, MAX_DEPTH, plain_scalar, read


@dataclass(frozen=True, slots=True)
class Document:
    """A graph, and the positions of its paths in the file, which are not part of the graph.

    Paths: ("engines", name, option), ("operators", name, option), ("executor", option),
    ("budgets", option), and ("edges", n) for the n-th edge of the graph, optionally followed by
    "source", "outlet", "target" or "inlet". A path has the position of its key; the path followed
    by "value" has the position of the key's value.
    """

    graph: Graph
    positions: Mapping[Path, Position]


def load(text: str, *, file: str) -> Document:
    """Read a graph from YAML. Raises GraphError with every mistake of form and its position.

    Ops, options and wiring are not checked here; `sagellm.graphs.check` checks them.
    """
    tree = read(text, file=file)
    reader = SurfaceReader(tree, text.splitlines())
    graph = reader.graph()
    mistakes = (*tree.mistakes, *reader.mistakes)
    if mistakes:
        raise GraphError(locate(mistakes, reader.positions))
    return Document(graph, reader.positions)


def load_file(path: str | FilePath) -> Document:
    """Read a graph from a UTF-8 file. Raises OSError, and GraphError as `load` does."""
    with open(path, "rb") as file:
        content = file.read(
            4 * MAX_CHARACTERS + 1
        )  # 4 bytes a character at most; `load` refuses a longer text
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise GraphError((_not_utf8(str(path), content[: error.start]),)) from None
    return load(text, file=str(path))


def _not_utf8(file: str, before: bytes) -> Diagnostic:
    line, column = before.count(b"\n") + 1, len(before) - before.rfind(b"\n")
    hint = "save the file as UTF-8"
    return Diagnostic("bad-text", (), "this byte is not UTF-8", hint, Position(file, line, column))


def dump(graph: Graph) -> str:
    """Write a stream graph as YAML. `load` of the text gives an equal graph.

    Raises GraphError for what YAML cannot hold: kernel graphs, bodies, typed edges, and functions
    without a registered name. `sagellm.graphs.text.codec` holds all of these except such functions.
    """
    _refuse_unwritable(graph)
    return _written(graph)


_PLAIN = re.compile(r"(?:~/|\.{1,2}/|/)?[A-Za-z_](?:[\w./@+~-]*[\w/])?", re.ASCII)
_SYMBOL = re.compile(r"[A-Za-z_]\w*(?:[.:][A-Za-z_]\w*)*")


def _written(graph: Graph) -> str:
    """The YAML text of a graph that `_refuse_unwritable` accepts."""
    return "\n".join(_lines(graph)) + "\n"


def _lines(graph: Graph) -> Iterator[str]:
    yield f"sagellm: {VERSION}"
    yield f"name: {scalar(graph.name)}"
    if "imports" in graph.attrs:
        yield f"imports: {flow(graph.attrs['imports'])}"
    if "engines" in graph.attrs:
        yield from _section("engines", graph.engines)
    if "models" in graph.attrs:
        yield from _section("models", graph.models)
    yield from _section("operators", {node.name: _entries(node) for node in graph.nodes})
    yield "edges:" if graph.edges else "edges: []"
    yield from (f"  - {chain}" for chain in chains(graph.edges))
    if "budgets" in graph.attrs:
        yield f"budgets: {flow(graph.attrs['budgets'])}"
    if "executor" in graph.attrs:
        yield f"executor: {flow(graph.attrs['executor'])}"


def _entries(node: Node) -> FrozenMap:
    return FrozenMap({"op": node.op, **node.attrs})


def _section(name: str, entries: Mapping[str, Value]) -> Iterator[str]:
    yield f"{name}:" if entries else f"{name}: {{}}"
    width = max((len(scalar(key)) + 1 for key in entries), default=0)
    for key, value in entries.items():
        yield f"  {scalar(key) + ':':{width}} {flow(value)}"


def flow(value: Value) -> str:
    """A value in YAML flow style, on one line."""
    if isinstance(value, FrozenMap):
        return "{" + ", ".join(f"{scalar(key)}: {flow(item)}" for key, item in value.items()) + "}"
    if isinstance(value, tuple):
        return "[" + ", ".join(map(flow, value)) + "]"
    return scalar(value)


def scalar(value: bool | int | float | str | None) -> str:
    """A scalar in YAML 1.2. A text is quoted if YAML could read another value from it."""
    if not isinstance(value, str):
        return json.dumps(value)  # YAML 1.2 reads JSON's numbers, true, false and null alike
    if _PLAIN.fullmatch(value) and plain_scalar(value) == value:
        return value
    quoted = json.dumps(value, ensure_ascii=False)
    return "".join(letter if letter.isprintable() else _escape(letter) for letter in quoted)


def _escape(letter: str) -> str:
    return f"\\u{ord(letter):04x}" if ord(letter) < 0x10000 else f"\\U{ord(letter):08x}"


def _refuse_unwritable(graph: Graph) -> None:
    """Raise GraphError with every part of a graph that the YAML form cannot hold."""
    found = (*_lowered(graph), *_names(graph), *_shapes(graph), *_values(graph))
    if found:
        raise GraphError(found)


def _refusal(path: Path, message: str, hint: str) -> Diagnostic:
    return Diagnostic("not-surface", path, message, hint)


def _lowered(graph: Graph) -> Iterator[Diagnostic]:
    hint = "write the graph as JSON"
    if graph.dialect != "stream":
        yield _refusal((), f"a {graph.dialect} graph has no YAML form", hint)
    for node in graph.nodes:
        if node.body is not None:
            path = ("operators", node.name)
            yield _refusal(path, f"`{node.name}` has a body, which YAML does not hold", hint)
    for number, edge in enumerate(graph.edges):
        if edge.type is not None:
            yield _refusal(("edges", number), f"`{edge}` is typed, which YAML does not say", hint)


def _names(graph: Graph) -> Iterator[Diagnostic]:
    ends = {name for edge in graph.edges for name in (edge.source, edge.target)}
    ports = {name for edge in graph.edges for name in (edge.outlet, edge.inlet)}
    for name in sorted({*graph.names, *graph.engines, *graph.models, *ends, *ports}):
        if not NAME.fullmatch(name):
            hint = "use letters, digits, `_` and, inside the name, `-`"
            yield _refusal((), f"`{name}` is no name in YAML", hint)
    for name in sorted({*graph.names, *graph.engines}):
        if graph.names.count(name) > 1 or name in (SOURCE, SINK):
            yield _refusal(("operators", name), f"`{name}` is taken", "choose another name")


def _shapes(graph: Graph) -> Iterator[Diagnostic]:
    for key in graph.attrs:
        if key == "imports":
            yield from _imports(graph.attrs[key])
        elif key not in ("engines", "models", "budgets", "executor"):
            yield _refusal((key,), f"`{key}` has no place in the YAML form", "remove it")
        elif not isinstance(graph.attrs[key], FrozenMap):
            yield _refusal((key,), f"`{key}` must be a mapping", "give it options by name")
    for section, entries in (("engines", graph.engines), ("models", graph.models)):
        for name, options in entries.items():
            if not isinstance(options, FrozenMap):
                yield _refusal((section, name), f"`{name}` must be a mapping", "name its options")
    if "kind" not in _executor(graph):
        yield _refusal(("executor",), "the executor has no kind", "add `kind: tasks`")


def _imports(value: Value) -> Iterator[Diagnostic]:
    names = value if isinstance(value, tuple) else (None,)
    if not all(isinstance(name, str) and name for name in names):
        yield _refusal(("imports",), "`imports` must be a list of texts", "name modules and files")


def _executor(graph: Graph) -> FrozenMap:
    executor = graph.attrs.get("executor", FrozenMap({"kind": "tasks"}))
    return executor if isinstance(executor, FrozenMap) else FrozenMap({"kind": "tasks"})


def _values(graph: Graph) -> Iterator[Diagnostic]:
    yield from _unwritable((), graph.attrs, 0)
    for node in graph.nodes:
        path: Path = ("operators", node.name)
        yield from _unwritable(path, node.attrs, 2)  # 2: below `operators` and the name
        if "op" in node.attrs:
            yield _refusal(path, "an option may not be called `op`", "rename it")
        function = node.attrs.get("function")
        if isinstance(function, str) and not _SYMBOL.fullmatch(function):
            message = f"`{node.name}` runs a function of this process alone, `{function}`"
            yield _refusal((*path, "function"), message, "register the function under a name")


def _unwritable(path: Path, value: Value, depth: int) -> Iterator[Diagnostic]:
    if isinstance(value, FrozenMap | tuple):
        pairs = value.items() if isinstance(value, FrozenMap) else enumerate(value)
        if depth >= MAX_DEPTH:
            yield _refusal(path, f"nested deeper than {MAX_DEPTH} levels", "flatten it")
            return
        for key, item in pairs:
            yield from _unwritable((*path, key), item, depth + 1)
    elif isinstance(value, float) and not math.isfinite(value):
        yield _refusal(path, f"{value} is no finite number", "use a number")
    elif isinstance(value, int) and not -(2**63) <= value < 2**63:
        yield _refusal(path, f"{value} does not fit 64 bits", "use a smaller number")
