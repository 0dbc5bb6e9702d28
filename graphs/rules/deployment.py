"""Rules on engines and models: capabilities, replicas, memory, model names and routes."""

from collections.abc import Iterator

from sagellm.graphs.diagnostics import VALUE, Diagnostic, Path
from sagellm.graphs.ir import SOURCE, FrozenMap, Graph, downstream
from sagellm.graphs.kernels.memory_layout import ITEM_BYTES, SCALE_BYTES
from sagellm.graphs.rules.option_types import check_options
from sagellm.graphs.rules.rule import CheckContext, EngineFactsView, choice
from sagellm.graphs.sections import (
    AUTOSCALE,
    EMBED,
    MODELS_OPTION,
    ROUTE_MODEL,
    SCALED_OPTION,
    ModelEntryOptions,
    ReplicaBounds,
    engine_kind,
    executor_kind,
    model_engines,
    model_outlets,
    model_routers,
    model_tasks,
    most_replicas,
    num_replicas,
    router_outlets,
    scaled_engines,
    served_models,
)
from sagellm.graphs.vocabulary import unmet_needs

ROUTE = "route"
_TASK_VERBS = {"generate": "generates", EMBED: "embeds"}


def capabilities(context: CheckContext) -> Iterator[Diagnostic]:
    for node, spec in context.specified:
        engine = context.engine_of(node, spec)
        offered = context.facts.engine(engine).capabilities if engine else None
        if engine is None or offered is None or not (unmet := unmet_needs(spec.needs, offered)):
            continue
        what = ", ".join(need.replace("|", " or ") for need in unmet)
        kind = engine_kind(context.graph.engines[engine])
        message = f"`{node.name}` needs {what}, which engine `{engine}` of kind `{kind}` lacks"
        path = ("operators", node.name, "engine", VALUE)
        hint = _capable_engines(context, spec.needs, offered)
        yield Diagnostic("missing-capability", path, message, hint)


def _capable_engines(context: CheckContext, needs: frozenset[str], offered: frozenset[str]) -> str:
    """A hint: an engine of the graph and the kinds of engines that have the needed capabilities."""
    engines = (
        name
        for name in context.graph.engines
        if not unmet_needs(needs, context.facts.engine(name).capabilities or frozenset())
    )
    kinds = [
        name
        for name, kind in (context.facts.engine_kinds or {}).items()
        if not unmet_needs(needs, kind.capabilities)
    ]
    fixes = [f"use engine `{name}`" for name in engines][:1]
    if kinds:
        fixes.append(f"an engine of kind {' or '.join(f'`{kind}`' for kind in kinds)} can do it")
    return "; ".join(fixes) or f"it offers {', '.join(sorted(offered)) or 'nothing'}"


def routed_replicas(context: CheckContext) -> Iterator[Diagnostic]:
    unrouted = unrouted_nodes(context.graph)
    for node, spec in context.specified:
        engine = context.engine_of(node, spec)
        if engine and node.name in unrouted and (count := _replicas(context, engine)) > 1:
            message = (
                f"engine `{engine}` has {count} replicas; nothing chooses one for `{node.name}`"
            )
            hint = f"put an operator with `op: {ROUTE}` before `{node.name}`"
            yield Diagnostic("unrouted-replicas", ("operators", node.name), message, hint)


def unrouted_nodes(graph: Graph) -> set[str]:
    """The names that a request reaches without passing an operator `route`."""
    routers = [node.name for node in graph.nodes if node.op == ROUTE]
    return downstream(graph, SOURCE, avoiding=routers)


def _replicas(context: CheckContext, engine: str) -> int:
    """The most replicas of an engine: the fact if it is known, else as its options say, else 1."""
    return max(context.facts.engine(engine).replicas or 0, most_replicas(context.graph, engine))


def autoscaled(context: CheckContext) -> Iterator[Diagnostic]:
    """The bounds of scaled engines must fit each other, the engines and the place of the operator.

    An engine has one `autoscale`, which is before its queue, because the queue shows what waits.
    """
    owners: dict[str, str] = {}
    for node in context.graph.nodes:
        bounds = node.attrs.get(SCALED_OPTION) if node.op == AUTOSCALE else None
        if not isinstance(bounds, FrozenMap):
            continue
        if not bounds:
            path: Path = ("operators", node.name, SCALED_OPTION, VALUE)
            hint = "write `{ENGINE: {max: 4}}`"
            yield Diagnostic("wrong-value", path, f"`{node.name}` scales nothing", hint)
        for engine, values in bounds.items():
            path = ("operators", node.name, SCALED_OPTION, engine)
            owner = owners.setdefault(engine, node.name)
            if engine not in context.graph.engines:
                hint = choice(engine, context.graph.engines)
                yield Diagnostic("unknown-engine", path, f"no engine is called `{engine}`", hint)
            elif owner != node.name:
                message = f"`{owner}` and `{node.name}` both scale engine `{engine}`"
                yield Diagnostic("scaled-twice", path, message, "leave it to one of them")
            elif isinstance(values, FrozenMap):
                yield from check_options(path, values, ReplicaBounds, context.facts)
                yield from _bounds(context.graph, path, engine, values)


def _bounds(graph: Graph, path: Path, engine: str, values: FrozenMap) -> Iterator[Diagnostic]:
    """The contradictions between the bounds of one engine, and with its number of replicas."""
    least, most = values.get("min", 1), values.get("max")
    if not isinstance(least, int) or not isinstance(most, int) or min(least, most) < 1:
        return
    count = num_replicas(graph.engines[engine])
    if least > most:
        message = f"engine `{engine}`: `min` {least} is above `max` {most}"
        yield Diagnostic("out-of-range", (*path, "min"), message, "swap them")
    elif not least <= count <= most:
        message = f"engine `{engine}` begins with {count} replicas, and has from {least} to {most}"
        hint = f"write `replicas: {least}` in the engine, or other bounds"
        yield Diagnostic("out-of-range", path, message, hint)


def scaled_paths(context: CheckContext) -> Iterator[Diagnostic]:
    """An operator `autoscale` must see all requests of its engines, and their queue."""
    for engine, (name, _) in scaled_engines(context.graph).items():
        path: Path = ("operators", name, SCALED_OPTION, engine)
        for message, hint in _unseen(context, engine, name):
            yield Diagnostic("unscaled-path", path, message, hint)


def _unseen(context: CheckContext, engine: str, name: str) -> Iterator[tuple[str, str]]:
    """The parts of the requests of an engine that the operator `name` does not see, with a fix."""
    graph = context.graph
    specs = tuple(context.specified)
    users = {node.name for node, spec in specs if context.engine_of(node, spec) == engine}
    missed = users & downstream(graph, SOURCE, avoiding=(name,))
    if missed:
        user = min(missed)
        message = f"requests reach `{user}` of engine `{engine}` without passing `{name}`"
        yield message, f"put `{name}` before `{user}` on every path"
        return
    queues = [node.name for node, spec in specs if spec.queues]
    for queue in queues:
        if queue not in downstream(graph, name) and users & downstream(graph, queue):
            message = f"`{name}` is behind `{queue}`, and does not see what waits there"
            yield message, f"put `{name}` before `{queue}`"


def scaled_models(context: CheckContext) -> Iterator[Diagnostic]:
    """The engines of one `autoscale` must serve one model, because their loads are compared."""
    graph = context.graph
    owners = {engine: name for engine, (name, _) in scaled_engines(graph).items()}
    for name in dict.fromkeys(owners.values()):
        own = {engine for engine, owner in owners.items() if owner == name}
        models = [one.key for one in served_models(graph) if own & set(one.engines)]
        if len(models) > 1:
            message = f"`{name}` scales engines of several models: {', '.join(models)}"
            hint = f"give each model an `{AUTOSCALE}` of its own, behind its outlet"
            yield Diagnostic("scaled-models", ("operators", name), message, hint)


def fixed_replicas(context: CheckContext) -> Iterator[Diagnostic]:
    """The executor must be able to add replicas to scaled engines."""
    graph = context.graph
    if context.facts.is_simulated or executor_kind(graph) != "tasks":
        return
    for name in dict.fromkeys(owner for owner, _ in scaled_engines(graph).values()):
        message = f"`{name}` scales engines, and executor `tasks` adds no replicas"
        hint = "write `executor: {kind: processes}`, or leave the operator out"
        yield Diagnostic("fixed-replicas", ("operators", name, "op", VALUE), message, hint)


def memory(context: CheckContext) -> Iterator[Diagnostic]:
    """The KV pools of all engines on a device must fit into its memory.

    The limit is the memory size from which the sizes of the pools were computed.
    """
    views = {name: context.facts.engine(name) for name in context.graph.engines}
    for device in dict.fromkeys(view.device for view in views.values()):
        here = {name: view for name, view in views.items() if view.device == device}
        known = [view.memory_bytes for view in here.values() if view.memory_bytes is not None]
        limit = max(known, default=context.facts.memory_bytes)
        yield from _memory_excess(context, tuple(here), limit)


def _memory_excess(
    context: CheckContext, engines: tuple[str, ...], limit: int | None
) -> Iterator[Diagnostic]:
    pools = {name: _pool_bytes(context, name) for name in engines}
    total = sum(pools.values())
    if limit is None or total <= limit:
        return
    largest = max(pools, key=lambda name: pools[name])
    message = f"the KV pools need {_mib(total)}, and there are {_mib(limit)} of memory"
    if len(pools) > 1:
        message += f"; `{largest}` needs {_mib(pools[largest])}"
    hint = _fitting_blocks(context, largest, limit - total + pools[largest])
    yield Diagnostic("too-much-memory", ("engines", largest), message, hint)


def _pool_bytes(context: CheckContext, engine: str) -> int:
    return (context.facts.engine(engine).kv_pool_bytes or 0) * _replicas(context, engine)


def _fitting_blocks(context: CheckContext, engine: str, free_bytes: int) -> str:
    """A hint: the number of blocks that would fit, if the facts give the size of a block."""
    block_bytes = _block_bytes(context.facts.engine(engine))
    if block_bytes is None or free_bytes < block_bytes:
        return "give the engines fewer KV blocks"
    num_blocks = free_bytes // (block_bytes * _replicas(context, engine))
    return f"{num_blocks} blocks a replica of `{engine}` would fit"


def _block_bytes(facts: EngineFactsView) -> int | None:
    # An unknown factor counts as 0, so that the whole size counts as unknown.
    factors = (facts.num_layers, facts.num_kv_heads, facts.block_size)
    row_bytes = (facts.head_dim or 0) * ITEM_BYTES.get(facts.dtype or "", 0)
    if facts.kv_cache_dtype == "int8" and row_bytes:
        row_bytes = (facts.head_dim or 0) + SCALE_BYTES
    size = 2 * row_bytes  # keys and values
    for factor in factors:
        size *= factor or 0
    return size or None


def _mib(num_bytes: int) -> str:
    return f"{num_bytes / 2**20:,.1f} MiB"


def model_options(context: CheckContext) -> Iterator[Diagnostic]:
    for key, given in context.graph.models.items():
        path: Path = ("models", key)
        if isinstance(given, FrozenMap):
            yield from check_options(path, given, ModelEntryOptions, context.facts)
        else:
            message = f"the options of model `{key}` must be a mapping"
            yield Diagnostic("wrong-type", path, message, "write `{aliases: [...]}`, or `{}`")


def known_tasks(context: CheckContext) -> Iterator[Diagnostic]:
    """The tasks that a model lists must be those of its operators."""
    for key, given in context.graph.models.items():
        tasks = given.get("tasks") if isinstance(given, FrozenMap) else None
        if not isinstance(tasks, tuple):
            continue
        path: Path = ("models", key, "tasks", VALUE)
        built = model_tasks(context.graph, key)
        hint = f"write `tasks: [{', '.join(built)}]`, or leave it out"
        if not tasks:
            yield Diagnostic("wrong-value", path, f"`tasks` of `{key}` lists nothing", hint)
        for task in dict.fromkeys(tasks):
            if built and task in _TASK_VERBS and task not in built:
                verb = _TASK_VERBS[str(task)]
                message = f"`{key}` is to {task}, and no operator of the model {verb}"
                more = f"; or lead its outlet to an operator `{EMBED}`" if task == EMBED else ""
                yield Diagnostic("unbuilt-task", path, message, hint + more)


def unique_model_names(context: CheckContext) -> Iterator[Diagnostic]:
    """A name that clients may use must belong to one model only."""
    owners: dict[str, str] = {}
    for model in served_models(context.graph):
        for name in dict.fromkeys((*model.names, model.key)) if model.key else ():
            owner = owners.setdefault(name, model.key)
            path: Path = ("models", model.key)
            if not name:
                message = f"a name of `{model.key}` is empty"
                yield Diagnostic("wrong-value", path, message, "write what clients call it")
            elif owner != model.key:
                message = f"`{owner}` and `{model.key}` are both called `{name}`"
                yield Diagnostic("duplicate-model", path, message, "give each names of its own")


def routed_models(context: CheckContext) -> Iterator[Diagnostic]:
    """Each model of the table must have an outlet, and each outlet a model if there is a table."""
    graph, outlets = context.graph, model_outlets(context.graph)
    routers = model_routers(graph)
    if not routers:
        for key in tuple(graph.models)[1:]:  # without a router, the first model gets every request
            message = f"nothing sends a request to `{key}` rather than to another model"
            hint = f"put an operator with `op: {ROUTE_MODEL}` behind `source`"
            yield Diagnostic("unrouted-model", ("models", key), message, hint)
        return
    for key in graph.models:
        if key not in outlets:
            message = f"no operator `{ROUTE_MODEL}` has an outlet for the model `{key}`"
            hint = f"add it to `{MODELS_OPTION}` of `{routers[0]}`"
            yield Diagnostic("unrouted-model", ("models", key), message, hint)
    for name in routers if graph.models else ():
        for key in router_outlets(graph, name):
            if key not in graph.models:
                path: Path = ("operators", name, MODELS_OPTION, VALUE)
                hint = choice(key, graph.models)
                message = f"the table `models` has no model `{key}`"
                yield Diagnostic("unknown-model", path, message, hint)


def models_with_engines(context: CheckContext) -> Iterator[Diagnostic]:
    """Each model must have an engine, and each engine a model."""
    graph = context.graph
    if not model_routers(graph):
        return
    used = {key: model_engines(graph, key) for key in model_outlets(graph)}
    for key, engines in used.items():
        if not engines:
            router = model_routers(graph)[0]
            path: Path = ("operators", router)
            message = f"no engine computes for the model `{key}`"
            hint = f"lead its outlet to an operator with an engine, `{router}.{key} ->`"
            yield Diagnostic("no-engine", path, message, hint)
    every = {name for engines in used.values() for name in engines}
    for node, spec in context.specified:
        engine = context.engine_of(node, spec)
        if engine is not None and engine not in every:
            message = f"no outlet of a `{ROUTE_MODEL}` leads to `{node.name}`"
            hint = f"put it behind an outlet, `{model_routers(graph)[0]}.MODEL -> {node.name}`"
            yield Diagnostic("unrouted-engine", ("operators", node.name), message, hint)
