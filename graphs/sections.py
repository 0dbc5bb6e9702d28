"""Reads the sections `engines`, `models`, `budgets` and `executor` of a stream graph.

A model enters the graph at an outlet of an operator `route_model`; the outlet has the model's key.
The engines of a model are downstream of that outlet. A graph without such an operator serves one
model.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

from sagellm.graphs.ir import FrozenMap, Graph, Value, downstream

LOCAL = "local"  # the default kind of engine, which computes a model
MODELLED = "modelled"  # the kind of engine for the device "null" and for the model "null"
EMBEDDINGS = "embedding"  # the kind of engine that embeds texts
OPENAI = "openai"  # the kind of engine for a server that speaks the OpenAI API
KIND = "kind"
ROUTE_MODEL = "route_model"
EMBED = "embed"  # the operator, and the task
MODELS_OPTION = "models"  # the option of `route_model` that lists its outlets
AUTOSCALE = "autoscale"
SCALED_OPTION = "engines"  # the option of `autoscale` that bounds the replicas of its engines
_DEVICE, _MODEL, _NULL = "device", "model", "null"


@dataclass(frozen=True, slots=True)
class ModelEntryOptions:
    """The options of an entry in the table of models.

    `name`: the model's name for clients, in answers and in metrics; the key of the entry unless
    given. `aliases`: further names for clients. `max_model_len`: the limit of a prompt and its
    answer in tokens, below the limit of the engines. `tasks`: the tasks that clients may request;
    None: those of the model's operators.
    """

    name: str | None = None
    aliases: tuple[str, ...] = ()
    max_model_len: int | None = field(default=None, metadata={"min": 2})
    tasks: tuple[Literal["generate", "embed"], ...] | None = None


@dataclass(frozen=True, slots=True)
class BudgetOptions:
    """The section `budgets`: latency objectives, and how operators share them.

    `slo_ttft_s`: the objective of requests that set none. `slo_tpot_s`: the objective of the mean
    time per token after the first. `ttft_shares`, `tpot_shares`: by operator, its share of each,
    from 0 to 1; along a path they sum to at most 1. Operators without a share get what is left, in
    proportion to the time that they have taken.
    """

    slo_ttft_s: float | None = field(default=None, metadata={"min": 1e-6})
    slo_tpot_s: float | None = field(default=None, metadata={"min": 1e-6})
    ttft_shares: Mapping[str, float] = field(default_factory=dict)
    tpot_shares: Mapping[str, float] = field(default_factory=dict)


SHARES = ("ttft_shares", "tpot_shares")


def budget_options(graph: Graph) -> BudgetOptions | None:
    """The section `budgets` of a graph that `check` has passed; None without it."""
    values = graph.attrs.get("budgets")
    return BudgetOptions(**values) if isinstance(values, FrozenMap) else None  # type: ignore[arg-type]


@dataclass(frozen=True, slots=True)
class ReplicaBounds:
    """The options of an engine that an operator `autoscale` scales.

    `min` and `max`: the numbers of replicas. `start_s`: how long a replica takes to start, until a
    start was measured; in a simulation, how long it takes. `drain_s`: the most time that a removed
    replica has to end its sequences; then other replicas take over the rest. `requests_per_s`: what
    one replica serves within the objectives; None: learned from what it serves.
    """

    max: int = field(metadata={"min": 1})
    min: int = field(default=1, metadata={"min": 1})
    start_s: float = field(default=10.0, metadata={"min": 0.0})
    drain_s: float = field(default=30.0, metadata={"min": 0.0})
    requests_per_s: float | None = field(default=None, metadata={"min": 1e-6})


@dataclass(frozen=True, slots=True)
class ServedModel:
    """One model of a graph that `check` has passed.

    `key` and `names` are empty if the graph has neither a table of models nor a `route_model`.
    `engines`: the engines that compute the model, in the order of the graph. `max_model_len`: the
    option of the model's entry in the table.
    """

    key: str
    names: tuple[str, ...]
    engines: tuple[str, ...]
    max_model_len: int | None = None


def engine_kind(values: Value) -> str:
    """The kind of an engine with the options `values`.

    Without an entry `kind`: `modelled` if the device or the model is "null", else `local`.
    """
    options = _options(values)
    if KIND in options:
        return str(options[KIND])
    return MODELLED if _is_null(options) else LOCAL


def kind_options(values: Value) -> FrozenMap:
    """The options that belong to the engine's kind. The entry `kind` is left out, and so is a
    device "null" that implied the kind `modelled`.
    """
    options = _options(values)
    dropped = {KIND} if KIND in options or not _is_null(options) else {_DEVICE}
    return FrozenMap({name: value for name, value in options.items() if name not in dropped})


def num_replicas(values: object) -> int:
    """The number of replicas of an engine with the options `values`; 1 by default."""
    count = values.get("replicas", 1) if isinstance(values, FrozenMap) else 1
    return count if isinstance(count, int) else 1


def scaled_engines(graph: Graph) -> dict[str, tuple[str, FrozenMap]]:
    """Each engine that an operator `autoscale` scales, with the operator and the bounds as written.

    The bounds of a graph that `check` has passed have the fields of `ReplicaBounds`.
    """
    found: dict[str, tuple[str, FrozenMap]] = {}
    for node in graph.nodes:
        bounds = node.attrs.get(SCALED_OPTION) if node.op == AUTOSCALE else None
        for engine, values in _options(bounds).items():
            found.setdefault(engine, (node.name, _options(values)))
    return found


def most_replicas(graph: Graph, engine: str) -> int:
    """The most replicas that an engine will have, which may be more than it begins with."""
    count = num_replicas(graph.engines.get(engine))
    _, bounds = scaled_engines(graph).get(engine, ("", FrozenMap()))
    most = bounds.get("max")
    return max(count, most) if isinstance(most, int) else count


def with_most_replicas(graph: Graph) -> Graph:
    """The graph whose engines begin with the most replicas that they will have."""
    most = {name: most_replicas(graph, name) for name in scaled_engines(graph)}
    engines = {
        name: FrozenMap({**_options(values), "replicas": most[name]}) if name in most else values
        for name, values in graph.engines.items()
    }
    return replace(graph, attrs=FrozenMap({**graph.attrs, "engines": FrozenMap(engines)}))


def executor_kind(graph: Graph) -> str:
    """The kind of the graph's executor; `tasks` by default."""
    executor = graph.attrs.get("executor")
    kind = executor.get("kind", "tasks") if isinstance(executor, FrozenMap) else executor
    return kind if isinstance(kind, str) else "tasks"


def _is_null(options: FrozenMap) -> bool:
    backend = str(options.get(_DEVICE)).partition(":")[0]
    return _NULL in (backend, options.get(_MODEL))


def _options(values: Value) -> FrozenMap:
    return values if isinstance(values, FrozenMap) else FrozenMap()


def served_models(graph: Graph) -> tuple[ServedModel, ...]:
    """The models of a graph: those of the table, then those of further outlets, each in order.

    The first model is the default.
    """
    keys = tuple(dict.fromkeys((*graph.models, *model_outlets(graph))))
    if not keys:
        return (ServedModel("", (), tuple(graph.engines)),)
    return tuple(_served_model(graph, key) for key in keys)


def _served_model(graph: Graph, key: str) -> ServedModel:
    values = graph.models.get(key, FrozenMap())
    limit = _options(values).get("max_model_len")
    max_model_len = limit if isinstance(limit, int) else None
    return ServedModel(key, model_names(key, values), model_engines(graph, key), max_model_len)


def model_routers(graph: Graph) -> tuple[str, ...]:
    """The names of the operators `route_model`."""
    return tuple(node.name for node in graph.nodes if node.op == ROUTE_MODEL)


def model_outlets(graph: Graph) -> tuple[str, ...]:
    """The outlets of all operators `route_model`, each once. Their names are keys of models."""
    return tuple(
        dict.fromkeys(key for name in model_routers(graph) for key in router_outlets(graph, name))
    )


def router_outlets(graph: Graph, router: str) -> tuple[str, ...]:
    """The outlets of one operator `route_model`."""
    keys = graph.node(router).attrs.get(MODELS_OPTION)
    return tuple(key for key in keys if isinstance(key, str)) if isinstance(keys, tuple) else ()


def model_engines(graph: Graph, key: str) -> tuple[str, ...]:
    """The engines downstream of a model's outlets; all engines if there is no `route_model`."""
    if not model_routers(graph):
        return tuple(graph.engines)
    nodes = _model_nodes(graph, key) & set(graph.names)
    used = {graph.node(name).attrs.get("engine") for name in nodes}
    return tuple(name for name in graph.engines if name in used)


def model_operators(graph: Graph, key: str) -> tuple[str, ...]:
    """The operators that a request for the model may pass.

    An operator that is downstream of no model's outlet belongs to all models.
    """
    routed = set[str]().union(*(_model_nodes(graph, name) for name in model_outlets(graph)))
    own = _model_nodes(graph, key)
    return tuple(name for name in graph.names if name in own or name not in routed)


def model_tasks(graph: Graph, key: str) -> tuple[str, ...]:
    """The tasks of a model: "embed" behind an operator `embed`, "generate" behind another one with
    an engine.
    """
    nodes = [graph.node(name) for name in model_operators(graph, key)]
    ops = {node.op == EMBED for node in nodes if "engine" in node.attrs}
    return tuple(task for task, is_embed in (("generate", False), (EMBED, True)) if is_embed in ops)


def model_names(key: str, values: Value) -> tuple[str, ...]:
    """The names that clients may use for a model. Answers name the model by the first one."""
    options = _options(values)
    name = options.get("name")
    return tuple(dict.fromkeys(_texts(key if name is None else name, options.get("aliases"))))


def _texts(name: Value, aliases: Value) -> Iterator[str]:
    listed = aliases if isinstance(aliases, tuple) else ()
    return (each for each in (name, *listed) if isinstance(each, str))


def _model_nodes(graph: Graph, key: str) -> set[str]:
    """The operators downstream of the outlets of a model, and `sink` if it is downstream."""
    first = (
        edge.target
        for name in model_routers(graph)
        for edge in graph.outputs(name, key)
        if not edge.feedback
    )
    return set[str]().union(*(downstream(graph, target) for target in first))
