"""The surface form of a stream graph: a YAML file that people write."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path as FilePath

from sagellm.graphs.diagnostics import Diagnostic, GraphError, Path, Position, locate
from sagellm.graphs.ir import Graph
from sagellm.graphs.text.surface import Surface
from sagellm.graphs.text.tree import MAX_CHARACTERS, read
from sagellm.graphs.text.writing import refuse_unwritable, write


@dataclass(frozen=True, slots=True)
class Document:
    """A graph as read, and where each path of it stands. Positions are no part of the graph.

    Paths: ("engines", name, option), ("operators", name, option), ("executor", option), and
    ("edges", n) for the n-th edge of the graph, with "source", "outlet", "target" or "inlet"
    behind it. A path is the place of its key; with "value" behind it, that of its value.
    """

    graph: Graph
    positions: Mapping[Path, Position]


def load(text: str, *, file: str) -> Document:
    """Read a graph. Raises GraphError with every mistake of form, each with its position.

    Whether its ops, options and wiring make sense is for `sagellm.graphs.check` to say.
    """
    tree = read(text, file=file)
    surface = Surface(tree, text.splitlines())
    graph = surface.graph()
    mistakes = (*tree.mistakes, *surface.mistakes)
    if mistakes:
        raise GraphError(locate(mistakes, surface.positions))
    return Document(graph, surface.positions)


def load_file(path: str | FilePath) -> Document:
    """Read a graph from a UTF-8 file. Raises OSError, and GraphError as `load` does."""
    with open(path, "rb") as file:
        content = file.read(4 * MAX_CHARACTERS + 1)  # `load` refuses what is longer
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
    """The YAML text of a surface graph; loading it gives an equal graph.

    Raises GraphError for what the surface form cannot hold: kernel graphs, bodies, typed edges,
    a function that has no name (`sagellm.graphs.text.codec` holds all but the last).
    """
    refuse_unwritable(graph)
    return write(graph)
