"""Finds the file of a graph by its name, and overrides options of the graph.

- A shipped name (`pd`) means the shipped graph, even if the current folder has a file `pd`.
- Any other name is the path of a file.
- `graphs/pd.yaml`, the path of a shipped graph in the repository, means the shipped graph if there
  is no folder `graphs`: examples work from a clone and from an installed package.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from sagellm import graphs
from sagellm.graphs.diagnostics import Diagnostic, GraphError
from sagellm.graphs.ir import FrozenMap, Graph, Node, freeze
from sagellm.graphs.log import get_logger
from sagellm.graphs.rules.option_types import old_names
from sagellm.graphs.sections import KIND, engine_kind, served_models
from sagellm.graphs.vocabulary import Vocabulary, nearest
from sagellm.runtime.engine.kinds import KINDS

_FOLDER = Path(graphs.__file__).parent
_IN_REPOSITORY = re.compile(r"graphs/(\w+)\.yaml")
SUFFIXES = (".yaml", ".yml")
ALIASES = {"aggregated": "joint"}
# Old names of operators in shipped graphs. `--set` accepts them for one version.
RENAMED_OPERATORS = {"route_joint": "route_aggregated"}
LOG = get_logger("sagellm.models")


def shipped_names() -> tuple[str, ...]:
    """The names of the shipped graphs."""
    return tuple(sorted(path.stem for path in _FOLDER.glob("*.yaml")))


def shipped_file(name: str) -> Path:
    """The file of a shipped graph, by its name or alias."""
    return _FOLDER / f"{ALIASES.get(name, name)}.yaml"


def is_shipped_name(name: object) -> bool:
    """Whether `name` is the name or the alias of a shipped graph."""
    return name in ALIASES or name in shipped_names()


def graph_file(name: str | Path) -> Path:
    """The file that a name means; the file need not exist. A `Path` never means a shipped name."""
    if isinstance(name, str) and is_shipped_name(name):
        return shipped_file(name)
    path, in_repository = Path(name), _IN_REPOSITORY.fullmatch(str(name))
    if in_repository and is_shipped_name(in_repository[1]) and not path.parent.exists():
        return shipped_file(in_repository[1])
    return path


def shadowed_by(name: str, folder: Path) -> str | None:
    """The path (`./pd.yaml`) of a file in `folder` that the shipped graph `name` hides, if any.

    The user can write this path to mean the file.
    """
    if not is_shipped_name(name):
        return None
    found = _first(folder, (f"{name}{suffix}" for suffix in (*SUFFIXES, "")))
    # In the folder of the shipped graphs, the file found is the shipped graph itself.
    is_shipped = found is not None and (folder / found).samefile(shipped_file(name))
    return None if is_shipped else found


def suggest_graph(name: str) -> str:
    """The hint for the name of a graph that does not exist."""
    close = nearest(Path(name).stem, (*shipped_names(), *ALIASES))
    return (
        f"did you mean {close}?"
        if close
        else f"give a file, or one of {', '.join(shipped_names())}"
    )


def _first(folder: Path, names: Iterable[str]) -> str | None:
    return next((f"./{name}" for name in names if (folder / name).exists()), None)


def override(graph: Graph, overrides: Mapping[str, Any], model: str | None = None) -> Graph:
    """The graph with options replaced, such as `{"split.min_uncached_tokens": 8}`.

    A target is `NAME.option`. NAME is looked up among operators, then engines, then models; the
    names `executor` and `budgets` mean the sections.
    `NAME.option.key` sets one key if the operator's option is a mapping. `model` replaces the model
    of every engine. Raises GraphError for an unknown NAME. Unknown options are accepted here: the
    check of the graph reports them.
    """
    for target, value in overrides.items():
        graph = _set(graph, target, value)
    if model is not None and len(served_models(graph)) > 1:  # all names would get the same model
        flag, hint = f"--model {model}", "write --set ENGINE.model=..."
        message = "the graph serves several models, and this would make one of them"
        raise GraphError((Diagnostic("bad-override", (flag,), message, hint),))
    return graph if model is None else _with_model(graph, model)


def _set(graph: Graph, target: str, value: Any) -> Graph:
    name, dot, option = target.partition(".")
    if not dot or not option:
        raise _mistake(target, value, "write NAME.option=value")
    if name not in graph.names and RENAMED_OPERATORS.get(name) in graph.names:
        LOG.warning("operator_renamed", operator=name, fix=f"write {RENAMED_OPERATORS[name]}")
        name = RENAMED_OPERATORS[name]
    if name == "executor":
        return _with_executor(graph, option, value)
    if name == "budgets":
        return _with_budget(graph, option, value)
    if name in graph.names:
        nodes = tuple(
            _with_option(node, option, value) if node.name == name else node for node in graph.nodes
        )
        return replace(graph, nodes=nodes)
    if name in graph.engines:
        kept = _with_kind(graph, name, value) if option == KIND else graph
        return with_engine_options(kept, name, {option: value})
    if name in graph.models:
        return _with_entry(graph, "models", name, {option: value})
    known = (*graph.names, *graph.engines, *graph.models)
    close = nearest(name, known)
    hint = f"did you mean {close}?" if close else f"there are {', '.join(known)}"
    raise _mistake(target, value, f"no operator, engine or model is named {name!r}", hint)


def _with_option(node: Node, option: str, value: Any) -> Node:
    whole, dot, key = option.partition(".")
    before = node.attrs.get(whole, FrozenMap())
    if not dot or not isinstance(before, FrozenMap):  # the check reports a key of no mapping
        return node.with_attrs(**{option: value})
    return node.with_attrs(**{whole: FrozenMap({**before, key: freeze(value)})})


def _with_executor(graph: Graph, option: str, value: Any) -> Graph:
    """The graph with an option of the executor set. A new kind drops the old kind's options."""
    before = graph.attrs.get("executor")
    known = dict(before) if isinstance(before, FrozenMap) and option != "kind" else {}
    changed = FrozenMap({**known, option: freeze(value)})
    return replace(graph, attrs=FrozenMap({**graph.attrs, "executor": changed}))


def _with_budget(graph: Graph, option: str, value: Any) -> Graph:
    """The graph with an option of the section `budgets` set, or one share as `ttft_shares.sort`."""
    before = graph.attrs.get("budgets", FrozenMap())
    known = Node("budgets", "", before if isinstance(before, FrozenMap) else FrozenMap())
    changed = _with_option(known, option, value).attrs
    return replace(graph, attrs=FrozenMap({**graph.attrs, "budgets": changed}))


def _with_kind(graph: Graph, name: str, kind: Any) -> Graph:
    """The graph with engine `name` prepared for `kind`: options that `kind` lacks are dropped."""
    before = graph.engines[name]
    if kind not in KINDS or not isinstance(before, FrozenMap):
        return graph  # the check reports both
    options = KINDS[kind].options
    known = {option.name for option in fields(options)} | set(old_names(options))
    kept = FrozenMap({option: value for option, value in before.items() if option in known})
    whole = FrozenMap({**graph.engines, name: kept})
    return replace(graph, attrs=FrozenMap({**graph.attrs, "engines": whole}))


def with_engine_options(graph: Graph, name: str, options: Mapping[str, Any]) -> Graph:
    """The graph with options of one engine changed.

    A new value replaces the value of the file under either spelling of the option.
    """
    before = graph.engines[name]
    kind = engine_kind(before)
    if kind in KINDS.ours and isinstance(before, FrozenMap):
        current = old_names(KINDS[kind].options)
        spellings = {**current, **{name: old for old, name in current.items()}}
        replaced = {spellings.get(option) for option in options}
        kept = FrozenMap({key: value for key, value in before.items() if key not in replaced})
        whole = FrozenMap({**graph.engines, name: kept})
        graph = replace(graph, attrs=FrozenMap({**graph.attrs, "engines": whole}))
    return _with_entry(graph, "engines", name, options)


def _with_entry(graph: Graph, section: str, name: str, options: Mapping[str, Any]) -> Graph:
    """The graph with options of one engine or one model changed."""
    entries = graph.engines if section == "engines" else graph.models
    before = entries[name]
    known = dict(before) if isinstance(before, FrozenMap) else {}
    changed = FrozenMap({**known, **{key: freeze(value) for key, value in options.items()}})
    whole = FrozenMap({**entries, name: changed})
    return replace(graph, attrs=FrozenMap({**graph.attrs, section: whole}))


def _with_model(graph: Graph, model: str) -> Graph:
    for name in graph.engines:
        graph = with_engine_options(graph, name, {"model": model})
    return graph


def assignment(target: str, value: Any) -> str:
    """An override as the user writes it on the command line, for error messages."""
    return f"--set {target}={value}"


def _mistake(target: str, value: Any, message: str, hint: str | None = None) -> GraphError:
    return GraphError((Diagnostic("bad-override", (assignment(target, value),), message, hint),))


def with_outlet_names(graph: Graph, vocabulary: Vocabulary) -> Graph:
    """The graph with outlet aliases (`joint` of `pd_split`) replaced by the current names.

    Later code sees no aliases. Logs a warning for each alias.
    """
    ops, edges = {node.name: node.op for node in graph.nodes}, []
    for edge in graph.edges:
        op = ops.get(edge.source)  # None: the edge starts at the graph's entry
        spec = vocabulary.get(op) if op is not None else None
        port = spec.outlet(edge.outlet) if spec is not None else None
        if port is not None and port.name != edge.outlet:
            old, new = f"{edge.source}.{edge.outlet}", f"{edge.source}.{port.name}"
            LOG.warning("outlet_renamed", graph=graph.name, outlet=old, fix=f"write {new}")
            edge = replace(edge, outlet=port.name)
        edges.append(edge)
    return replace(graph, edges=tuple(edges))
