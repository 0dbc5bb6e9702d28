"""What GRAPH means on the command line: a file, the name of a shipped graph, or a model."""

from collections.abc import Sequence
from pathlib import Path

from sagellm.builder import Graph
from sagellm.cli.errors import Failure, warn
from sagellm.extensions import ImportMistake, import_each
from sagellm.graphs.sections import served_models
from sagellm.graphs.vocabulary import nearest
from sagellm.opening.sources import SUFFIXES, graph_file, shadowed_by, shipped_names, suggest_graph
from sagellm.runtime.models.files import is_model_file
from sagellm.runtime.models.folder import BUILT_IN
from sagellm.several_models import graph_of_models

DEFAULT_GRAPH = "joint"
NULL = "null"  # a model without weights, for device null


def choose_graph(
    name: str, model: str | None, imports: tuple[str, ...] = ()
) -> tuple[Graph, str | None]:
    """The graph that GRAPH names, or the graph `joint` for a model, and the model of its engines
    where one is chosen. The user's own code that `--import` names is imported first.

    Raises Failure where GRAPH or --model is wrong, GraphError where the graph is.
    """
    file = find_graph_file(name, model)
    import_code(imports)
    if file is None:
        return Graph.load(DEFAULT_GRAPH), name
    if model is not None:
        _warn_shadowed_model(model)
    return Graph.load(file), model


def choose_graphs(
    names: Sequence[str], model: str | None, imports: tuple[str, ...] = ()
) -> tuple[Graph, str | None]:
    """As `choose_graph`; several names are models, which one graph serves side by side."""
    if len(names) == 1:
        return choose_graph(names[0], model, imports)
    for name in names:
        if find_graph_file(name) is not None:
            cause = f"{name} is a graph, and several names are models"
            raise Failure(cause, "serve one graph, or name models alone; a graph may serve several")
    if model is not None:
        cause = f"--model {model} names the model of a graph, and several models are named"
        raise Failure(cause, "leave --model out")
    import_code(imports)
    try:
        return graph_of_models(names), None
    except ValueError as error:
        fix = "write a graph file, whose table `models` gives each a name"
        raise Failure(str(error), fix, " ".join(names)) from None


def choose_model(graph: Graph, model: str | None) -> tuple[str | None, str]:
    """What `--model` means: the model of every engine; or, of a graph that serves several, the one
    that is asked. Raises Failure where it serves none of that name.
    """
    served = served_models(graph.ir)
    if len(served) == 1 or model is None:
        return model, ""
    known = [name for each in served for name in each.names]
    if model not in known and model not in [each.key for each in served]:
        close = nearest(model, known)
        fix = f"did you mean {close}?" if close else f"there are {', '.join(known)}"
        raise Failure("the graph serves no such model", fix, f"--model {model}")
    return None, model


def find_graph_file(name: str, model: str | None = None) -> Path | None:
    """The file of the graph that GRAPH names, or None where GRAPH names a model.

    A file or folder of the current folder that has the name of what ships with sagellm is shown as
    a warning. Raises Failure for a name of nothing, and for a model beside another `model`.
    """
    file = graph_file(name)
    if file.is_file() and not is_model_file(file):
        warn_shadowed_graph(name, Path.cwd(), "in this folder")
        return file
    if file.suffix in SUFFIXES:
        raise Failure("no such graph", suggest_graph(name), name)
    if model is not None:
        cause = f"{name} is no graph, and --model names the model of a graph"
        raise Failure(cause, "give one of them, or a graph file and --model")
    _check_model_name(name)
    _warn_shadowed_model(name)
    return None


def import_code(names: tuple[str, ...]) -> None:
    """Import what `--import` names; paths are relative to the current folder. Raises Failure."""
    try:
        import_each(names, Path.cwd())
    except ImportMistake as mistake:
        raise Failure(mistake.cause, mistake.fix, f"--import {mistake.name}") from mistake


def warn_shadowed_graph(name: str, folder: Path, where: str) -> None:
    """Show which file of a folder the name of a shipped graph does not mean."""
    if other := shadowed_by(name, folder):
        warn(f"{name} means the shipped graph; write {other} for the one {where}")


def _check_model_name(name: str) -> None:
    """Raise Failure for a plain word that is neither built in nor a folder: a slip, as a rule."""
    if "/" in name or name in (*BUILT_IN, NULL) or Path(name).exists():
        return
    graphs, models = shipped_names(), tuple(BUILT_IN)
    close = nearest(name, (*graphs, *models))
    listed = f"graphs: {', '.join(graphs)}, a file; models: {', '.join(models)}, a folder, a Hub id"
    fix = f"did you mean {close}?" if close else listed
    raise Failure("there is no graph and no model of that name", fix, name)


def _warn_shadowed_model(model: str) -> None:
    """Show which folder the name of a built-in model does not mean."""
    if model in (*BUILT_IN, NULL) and Path(model).exists():
        warn(f"{model} means the shipped model; write ./{model} for the one in this folder")
