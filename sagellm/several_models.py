"""A graph for several models: each has its own admission, queue and engine."""

import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from sagellm import ops
from sagellm.builder import Graph
from sagellm.graphs.ir import SINK, SOURCE

NAME = "models"
MAX_QUEUED = 4096  # for each model; the shipped graphs have the same limit
_OTHER = re.compile(r"[^A-Za-z0-9_-]+")
_TAKEN = ("choose", "metrics", SOURCE, SINK, "terminal")


def public_model_name(model: str) -> str:
    """The name of a model for clients. A path becomes its last part: clients learn no paths."""
    return Path(model).resolve().name if Path(model).exists() else model


def model_keys(names: Iterable[str]) -> list[str]:
    """A unique key for each model; outlets and engines of the graph are named by these keys."""
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
    """`route_model`, then admission, queue and engine for each model, then one metrics sink.

    Raises ValueError for two models of one name.
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
