"""The GRAPH argument: a file, a shipped graph, a model, or several models."""

import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import msgspec
from cyclopts import Parameter

from sagellm import ops
from sagellm.backends import LoweringError, UnknownBackend
from sagellm.builder import Graph
from sagellm.cli.errors import Failure, suggestion, warn
from sagellm.extensions import ImportMistake, import_each
from sagellm.graphs.ir import SINK, SOURCE
from sagellm.graphs.sections import served_models
from sagellm.graphs.vocabulary import nearest
from sagellm.opening.sources import (
    ALIASES,
    SUFFIXES,
    graph_file,
    shadowed_by,
    shipped_names,
    suggest_graph,
)
from sagellm.runtime.engine.options import EngineOptionError
from sagellm.runtime.models.files import is_model_file
from sagellm.runtime.models.folder import BUILT_IN

NAME = "models"
MAX_QUEUED = 4096  # for each model; the shipped graphs have the same limit
_ENGINE_FIX = (
    "change the engine in the graph or by --set NAME.OPTION=VALUE, or give another --model"
)
_OTHER = re.compile(r"[^A-Za-z0-9_-]+")
_TAKEN = ("choose", "metrics", SOURCE, SINK, "terminal")  # names of other nodes, and reserved ones


@contextmanager
def engine_failures(graph: str) -> Iterator[None]:
    """Raise Failure if the block finds that an engine of `graph` cannot be opened."""
    try:
        yield
    except (UnknownBackend, LoweringError, EngineOptionError) as error:
        raise Failure(str(error), _ENGINE_FIX, graph) from None


def public_model_name(model: str) -> str:
    """The name of a model for clients: of a path only the last part, to hide the server's paths."""
    return Path(model).resolve().name if Path(model).exists() else model


def model_keys(names: Iterable[str]) -> list[str]:
    """A unique key for each model, which names the model's outlet and engine in the graph."""
    keys: list[str] = []
    for name in names:
        plain = _OTHER.sub("_", name.rpartition("/")[2]).strip("-") or "model"
        first = plain if plain[0].isalpha() or plain[0] == "_" else f"m_{plain}"
        key, number = first, 2
        while key in keys or key in _TAKEN:
            key, number = f"{first}_{number}", number + 1
        keys.append(key)
    return keys


def graph_of_models(models: Sequence[str]) -> Graph:
    """Build a graph that serves several models, each with its own admission, queue and engine.

    The graph begins with `route_model`, and all models share one `metrics_sink`. Raises ValueError
    if two models have the same name.
    """
    names = [public_model_name(model) for model in models]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise ValueError(f"two of the models are called {twice}")
    keys = model_keys(names)
    graph, choose, metrics = Graph(NAME), ops.route_model(keys).named("choose"), ops.metrics_sink()
    graph >> choose
    for key, name, model in zip(keys, names, models, strict=True):
        graph.engine(key, model=model, device="cpu").model(key, **_named(key, name))
        admission = ops.admission(max_queued=MAX_QUEUED).named(f"admission_{key}")
        sort = ops.policy_sort("slo_aware").named(f"sort_{key}")
        generate = ops.generate(engine=key).named(f"generate_{key}")
        choose.outlet(key) >> admission >> sort >> generate >> metrics.named("metrics")
    return graph


def _named(key: str, name: str) -> dict[str, str]:
    return {} if key == name else {"name": name}


DEFAULT_GRAPH = "joint"
NULL = "null"  # the model without weights, for device null

Assignments = Annotated[tuple[str, ...], Parameter(name="--set")]
Imports = Annotated[
    tuple[str, ...],
    Parameter(
        name="--import",
        help="A dotted module or a .py file of yours, which registers what the graph uses; may be "
        "repeated.",
    ),
]


def choose_graph(
    name: str, model: str | None, imports: tuple[str, ...] = ()
) -> tuple[Graph, str | None]:
    """The graph that `name` means, and the model for its engines (None keeps the graph's models).

    If `name` means a model, the graph is DEFAULT_GRAPH. `imports` are imported before the graph is
    loaded. Raises Failure for a wrong GRAPH, --model or --import, GraphError for a wrong graph.
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
    """Choose like `choose_graph`, for one or more names. Several names must all mean models."""
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
    """Interpret `--model` for a graph: returns (model for every engine, model of the requests).

    In a graph of several models, `--model` is the model of the requests. In any other graph, it
    replaces the model of every engine. Raises Failure if the graph serves no such model.
    """
    served = served_models(graph.ir)
    if len(served) == 1 or model is None:
        return model, ""
    known = [name for each in served for name in each.names]
    if model not in known and model not in [each.key for each in served]:
        fix = suggestion(model, known)
        raise Failure("the graph serves no such model", fix, f"--model {model}")
    return None, model


def find_graph_file(name: str, model: str | None = None) -> Path | None:
    """The file of the graph that `name` means, or None if `name` means a model.

    Warns if the shipped meaning of `name` hides a file or folder in the current folder. Raises
    Failure for an unknown name, and for a model as `name` if `model` is given too.
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
    """Import modules and .py files; paths are relative to the current folder. Raises Failure."""
    try:
        import_each(names, Path.cwd())
    except ImportMistake as mistake:
        raise Failure(mistake.cause, mistake.fix, f"--import {mistake.name}") from mistake


def warn_shadowed_graph(name: str, folder: Path, where: str) -> None:
    """Warn if `name` means a shipped graph, and `folder` has a file of that name.

    `where` describes the folder in the warning.
    """
    if other := shadowed_by(name, folder):
        warn(f"{name} means the shipped graph; write {other} for the one {where}")


def _check_model_name(name: str) -> None:
    """Raise Failure for a plain word that is no built-in model, file or folder: usually a typo.

    A name with a slash may be an id of the Hugging Face Hub; loading the model checks it.
    """
    if "/" in name or name in (*BUILT_IN, NULL) or Path(name).exists():
        return
    graphs, models = shipped_names(), tuple(BUILT_IN)
    close = nearest(name, (*graphs, *ALIASES, *models))
    listed = f"graphs: {', '.join(graphs)}, a file; models: {', '.join(models)}, a folder, a Hub id"
    fix = f"did you mean {close}?" if close else listed
    raise Failure("there is no graph and no model of that name", fix, name)


def _warn_shadowed_model(model: str) -> None:
    """Warn if `model` means a built-in model, and the current folder has a file of that name."""
    if model in (*BUILT_IN, NULL) and Path(model).exists():
        warn(f"{model} means the shipped model; write ./{model} for the one in this folder")


def parse_assignments(assignments: tuple[str, ...]) -> dict[str, object]:
    """Parse the `--set op.key=value` of the command line into {"op.key": value}.

    A value is read as JSON, or else as text. Raises Failure for an assignment without `op.key=`.
    """
    found: dict[str, object] = {}
    for assignment in assignments:
        path, equals, text = assignment.partition("=")
        if not equals or "." not in path.strip("."):
            cause = f"--set {assignment} does not say op.key=value"
            raise Failure(cause, "for example --set split.min_uncached_tokens=8")
        found[path] = _assigned_value(text)
    return found


def _assigned_value(text: str) -> object:
    # `null` stays text: it is the name of a device, and no option can be None.
    try:
        value: object = msgspec.json.decode(text)
    except ValueError:
        return text
    return text if value is None else value
