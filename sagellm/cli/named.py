"""What GRAPH means on the command line: a file, or the name of a graph that we ship."""

from importlib.resources import files
from pathlib import Path

from sagellm.builder import Graph, shipped
from sagellm.cli.failure import Failure
from sagellm.graphs.vocabulary import nearest
from sagellm.own_code import ImportMistake, import_each


def shipped_names() -> tuple[str, ...]:
    """The graphs that come with the package."""
    packaged = Path(str(files("sagellm.graphs")))
    return tuple(sorted(path.stem for path in packaged.glob("*.yaml")))


def load_graph(name: str, imports: tuple[str, ...] = ()) -> Graph:
    """The graph that GRAPH names, after the user's own code was imported that `--import` names.

    Raises Failure if there is none, GraphError if it is wrong.
    """
    if not shipped(name).is_file():
        raise no_graph(name)
    import_code(imports)
    return Graph.load(name)


def import_code(names: tuple[str, ...]) -> None:
    """Import what `--import` names; paths are relative to the current folder. Raises Failure."""
    try:
        import_each(names, Path.cwd())
    except ImportMistake as mistake:
        raise Failure(mistake.cause, mistake.fix, f"--import {mistake.name}") from mistake


def no_graph(name: str) -> Failure:
    """Says what graphs there are."""
    close = nearest(Path(name).stem, shipped_names())
    fix = f"did you mean {close}?" if close else f"give a file, or {', '.join(shipped_names())}"
    return Failure("no such graph", fix, name)
