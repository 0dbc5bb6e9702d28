"""What GRAPH means on the command line: a file, or the name of a graph that we ship."""

from importlib.resources import files
from pathlib import Path

from sagellm.builder import Graph, shipped
from sagellm.cli.failure import Failure
from sagellm.graphs.vocabulary import nearest


def shipped_names() -> tuple[str, ...]:
    """The graphs that come with the package."""
    packaged = Path(str(files("sagellm.graphs")))
    return tuple(sorted(path.stem for path in packaged.glob("*.yaml")))


def load_graph(name: str) -> Graph:
    """The graph that GRAPH names. Raises Failure if there is none, GraphError if it is wrong."""
    if not shipped(name).is_file():
        raise no_graph(name)
    return Graph.load(name)


def no_graph(name: str) -> Failure:
    """Says what graphs there are."""
    close = nearest(Path(name).stem, shipped_names())
    fix = f"did you mean {close}?" if close else f"give a file, or {', '.join(shipped_names())}"
    return Failure("no such graph", fix, name)
