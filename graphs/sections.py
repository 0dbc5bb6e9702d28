"""Reads the sections `engines`, `models` and `executor` of a stream graph."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

from sagellm.graphs.ir import FrozenMap, Graph, Value, downstream

LOCAL = "local"  # the kind that computes, and the default
MODELLED = "modelled"  # the kind of the device "null" and of the model "null"
KIND = "kind"
_DEVICE, _MODEL, _NULL = "device", "model", "null"


def engine_kind(values: Value) -> str:
    """The kind of an engine: its entry `kind`. Without one, the kind is `modelled` where the device
    or the model is "null", which compute nothing, and `local` elsewhere.
    """
    given = _options(values)
    if KIND in given:
        return str(given[KIND])
    return MODELLED if _is_null(given) else LOCAL


def kind_options(values: Value) -> FrozenMap:
    """The options that the engine's kind is given: without `kind`, and without the device from
    which the kind `modelled` was derived.
    """
    given = _options(values)
    dropped = {KIND} if KIND in given or not _is_null(given) else {_DEVICE}
    return FrozenMap({name: value for name, value in given.items() if name not in dropped})


def _is_null(given: FrozenMap) -> bool:
    backend = str(given.get(_DEVICE)).partition(":")[0]
    return _NULL in (backend, given.get(_MODEL))


def _options(values: Value) -> FrozenMap:
    return values if isinstance(values, FrozenMap) else FrozenMap()


ROUTE_MODEL = "route_model"
MODELS_OPTION = "models"  # the option of `route_model` that lists its outlets


@dataclass(frozen=True, slots=True)
class ServedModelOptions:
    """What the table of models says of one. The key of its entry is its outlet of `route_model`.

    `name`: what clients call it, and answers and metrics name; the key unless given. `aliases`:
    further names. `max_model_len`: the most tokens of a prompt and its answer together, where that
    is less than its engines take. `tasks`: what it is asked for.
    """

    name: str | None = None
    aliases: tuple[str, ...] = ()
    max_model_len: int | None = field(default=None, metadata={"min": 2})
    tasks: tuple[Literal["generate", "embed"], ...] = ("generate",)


@dataclass(frozen=True, slots=True)
class ServedModel:
    """One model of a graph that `check` has passed.

    `key` and `names` are empty for the only model of a graph that says nothing of it. `engines`:
    those that compute for it, in the order of the graph. `max_model_len`: as the table has it.
    """

    key: str
    names: tuple[str, ...]
    engines: tuple[str, ...]
    max_model_len: int | None = None


def served_models(graph: Graph) -> tuple[ServedModel, ...]:
    """The models in the order of the table, else of the outlets; the first is the default."""
    keys = tuple(dict.fromkeys((*graph.models, *model_outlets(graph))))
    if not keys:
        return (ServedModel("", (), tuple(graph.engines)),)
    return tuple(_served_model(graph, key) for key in keys)


def model_routers(graph: Graph) -> tuple[str, ...]:
    """The operators that send each request to its model."""
    return tuple(node.name for node in graph.nodes if node.op == ROUTE_MODEL)


def model_outlets(graph: Graph) -> tuple[str, ...]:
    """The keys that lead from some `route_model`, each once."""
    return tuple(
        dict.fromkeys(key for name in model_routers(graph) for key in router_outlets(graph, name))
    )


def router_outlets(graph: Graph, router: str) -> tuple[str, ...]:
    """The keys that lead from one `route_model`."""
    keys = graph.node(router).attrs.get(MODELS_OPTION)
    return tuple(key for key in keys if isinstance(key, str)) if isinstance(keys, tuple) else ()


def model_engines(graph: Graph, key: str) -> tuple[str, ...]:
    """The engines downstream of a model's outlets; all, where nothing routes by model."""
    if not model_routers(graph):
        return tuple(graph.engines)
    nodes = _model_nodes(graph, key) & set(graph.names)
    named = {graph.node(name).attrs.get("engine") for name in nodes}
    return tuple(name for name in graph.engines if name in named)


def model_operators(graph: Graph, key: str) -> tuple[str, ...]:
    """The operators that a request for a model may pass: all but those of other models alone."""
    others = set[str]().union(*(_model_nodes(graph, name) for name in model_outlets(graph)))
    return tuple(
        name for name in graph.names if name in _model_nodes(graph, key) or name not in others
    )


def model_names(key: str, options: Value) -> tuple[str, ...]:
    """What clients may call a model, by its entry; the first is in answers."""
    given = options if isinstance(options, FrozenMap) else FrozenMap()
    name = given.get("name")
    return tuple(dict.fromkeys(_texts(key if name is None else name, given.get("aliases"))))


def _model_nodes(graph: Graph, key: str) -> set[str]:
    """All that the outlets of a model lead to."""
    entered = (
        edge.target
        for name in model_routers(graph)
        for edge in graph.outputs(name, key)
        if not edge.feedback
    )
    return set[str]().union(*(downstream(graph, target) for target in entered))


def _texts(name: Value, aliases: Value) -> Iterator[str]:
    listed = aliases if isinstance(aliases, tuple) else ()
    return (each for each in (name, *listed) if isinstance(each, str))


def _served_model(graph: Graph, key: str) -> ServedModel:
    options = graph.models.get(key, FrozenMap())
    limit = options.get("max_model_len") if isinstance(options, FrozenMap) else None
    max_model_len = limit if isinstance(limit, int) else None
    return ServedModel(key, model_names(key, options), model_engines(graph, key), max_model_len)
