"""Rules on the models that a graph serves: their table, their outlets, their engines."""

from collections.abc import Iterator

from sagellm.graphs.diagnostics import VALUE, Diagnostic, Path
from sagellm.graphs.ir import FrozenMap
from sagellm.graphs.rules.options import check_options
from sagellm.graphs.rules.subject import Subject, choice
from sagellm.graphs.served import (
    OUTLETS,
    ROUTE_MODEL,
    ModelOptions,
    engines_of,
    listed,
    outlets,
    routers,
    served_models,
)


def model_options(subject: Subject) -> Iterator[Diagnostic]:
    for key, given in subject.graph.models.items():
        path: Path = ("models", key)
        if isinstance(given, FrozenMap):
            yield from check_options(path, given, ModelOptions, subject.facts)
        else:
            message = f"the options of model `{key}` must be a mapping"
            yield Diagnostic("wrong-type", path, message, "write `{aliases: [...]}`, or `{}`")


def known_tasks(subject: Subject) -> Iterator[Diagnostic]:
    for key, given in subject.graph.models.items():
        tasks = given.get("tasks", ("generate",)) if isinstance(given, FrozenMap) else ("generate",)
        path: Path = ("models", key, "tasks", VALUE)
        hint = "write `tasks: [generate]`, or leave it out"
        if isinstance(tasks, tuple) and "embed" in tasks:
            message = f"`{key}` is to embed, and no operator of this version computes embeddings"
            yield Diagnostic("unbuilt-task", path, message, hint)
        elif tasks == ():
            yield Diagnostic("wrong-value", path, f"`tasks` of `{key}` lists nothing", hint)


def own_names(subject: Subject) -> Iterator[Diagnostic]:
    """A name that clients use means one model."""
    owners: dict[str, str] = {}
    for model in served_models(subject.graph):
        for name in dict.fromkeys((*model.names, model.key)) if model.key else ():
            owner = owners.setdefault(name, model.key)
            path: Path = ("models", model.key)
            if not name:
                message = f"a name of `{model.key}` is empty"
                yield Diagnostic("wrong-value", path, message, "write what clients call it")
            elif owner != model.key:
                message = f"`{owner}` and `{model.key}` are both called `{name}`"
                yield Diagnostic("duplicate-model", path, message, "give each names of its own")


def entered(subject: Subject) -> Iterator[Diagnostic]:
    """Each model of the table has an outlet, and each outlet a model of the table, if any."""
    graph, leading = subject.graph, outlets(subject.graph)
    found = routers(graph)
    if not found:
        for key in tuple(graph.models)[1:]:
            message = f"nothing sends a request to `{key}` rather than to another model"
            hint = f"put an operator with `op: {ROUTE_MODEL}` behind `source`"
            yield Diagnostic("unrouted-model", ("models", key), message, hint)
        return
    for key in graph.models:
        if key not in leading:
            message = f"no operator `{ROUTE_MODEL}` has an outlet for the model `{key}`"
            hint = f"add it to `{OUTLETS}` of `{found[0]}`"
            yield Diagnostic("unrouted-model", ("models", key), message, hint)
    for name in found if graph.models else ():
        for key in listed(graph, name):
            if key not in graph.models:
                path: Path = ("operators", name, OUTLETS, VALUE)
                hint = choice(key, graph.models)
                message = f"the table `models` has no model `{key}`"
                yield Diagnostic("unknown-model", path, message, hint)


def computed(subject: Subject) -> Iterator[Diagnostic]:
    """Each model has an engine, and each engine computes for a model."""
    graph = subject.graph
    if not routers(graph):
        return
    used = {key: engines_of(graph, key) for key in outlets(graph)}
    for key, engines in used.items():
        if not engines:
            path: Path = ("operators", routers(graph)[0])
            message = f"no engine computes for the model `{key}`"
            hint = f"lead its outlet to an operator with an engine, `{routers(graph)[0]}.{key} ->`"
            yield Diagnostic("no-engine", path, message, hint)
    every = {name for engines in used.values() for name in engines}
    for node, spec in subject.specified:
        engine = subject.engine_of(node, spec)
        if engine is not None and engine not in every:
            message = f"no outlet of a `{ROUTE_MODEL}` leads to `{node.name}`"
            hint = f"put it behind an outlet, `{routers(graph)[0]}.MODEL -> {node.name}`"
            yield Diagnostic("unrouted-engine", ("operators", node.name), message, hint)
