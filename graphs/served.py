"""The models that a stream graph serves: what its table says of them, and where each enters.

A model enters the graph at the outlet of its key of an operator `route_model`; its engines are
those downstream of that outlet. A graph without such an operator serves one model.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

from sagellm.graphs.ir import FrozenMap, Graph, Value
from sagellm.graphs.walks import reached

ROUTE_MODEL = "route_model"
OUTLETS = "models"  # the option of `route_model` that lists its outlets


@dataclass(frozen=True, slots=True)
class ModelOptions:
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
    keys = tuple(dict.fromkeys((*graph.models, *outlets(graph))))
    if not keys:
        return (ServedModel("", (), tuple(graph.engines)),)
    return tuple(_served(graph, key) for key in keys)


def routers(graph: Graph) -> tuple[str, ...]:
    """The operators that send each request to its model."""
    return tuple(node.name for node in graph.nodes if node.op == ROUTE_MODEL)


def outlets(graph: Graph) -> tuple[str, ...]:
    """The keys that lead from some `route_model`, each once."""
    return tuple(dict.fromkeys(key for name in routers(graph) for key in listed(graph, name)))


def listed(graph: Graph, router: str) -> tuple[str, ...]:
    """The keys that lead from one `route_model`."""
    keys = graph.node(router).attrs.get(OUTLETS)
    return tuple(key for key in keys if isinstance(key, str)) if isinstance(keys, tuple) else ()


def engines_of(graph: Graph, key: str) -> tuple[str, ...]:
    """The engines downstream of a model's outlets; all, where nothing routes by model."""
    if not routers(graph):
        return tuple(graph.engines)
    nodes = _downstream(graph, key) & set(graph.names)
    named = {graph.node(name).attrs.get("engine") for name in nodes}
    return tuple(name for name in graph.engines if name in named)


def operators_of(graph: Graph, key: str) -> tuple[str, ...]:
    """The operators that a request for a model may pass: all but those of other models alone."""
    others = set[str]().union(*(_downstream(graph, name) for name in outlets(graph)))
    return tuple(
        name for name in graph.names if name in _downstream(graph, key) or name not in others
    )


def names_of(key: str, options: Value) -> tuple[str, ...]:
    """What clients may call a model, by its entry; the first is in answers."""
    given = options if isinstance(options, FrozenMap) else FrozenMap()
    name = given.get("name")
    return tuple(dict.fromkeys(_texts(key if name is None else name, given.get("aliases"))))


def _downstream(graph: Graph, key: str) -> set[str]:
    """All that the outlets of a model lead to."""
    entered = (
        edge.target
        for name in routers(graph)
        for edge in graph.outputs(name, key)
        if not edge.feedback
    )
    return set[str]().union(*(reached(graph, target) for target in entered))


def _texts(name: Value, aliases: Value) -> Iterator[str]:
    listed = aliases if isinstance(aliases, tuple) else ()
    return (each for each in (name, *listed) if isinstance(each, str))


def _served(graph: Graph, key: str) -> ServedModel:
    options = graph.models.get(key, FrozenMap())
    limit = options.get("max_model_len") if isinstance(options, FrozenMap) else None
    max_model_len = limit if isinstance(limit, int) else None
    return ServedModel(key, names_of(key, options), engines_of(graph, key), max_model_len)
