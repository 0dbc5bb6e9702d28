"""Replay: the events of a log of decisions, given to a fresh core, whose effects are compared."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from sagellm.graphs.ir import Graph
from sagellm.graphs.text.codec import from_msgpack
from sagellm.models import load_models
from sagellm.overrides import override
from sagellm.registering import RESOLVER
from sagellm.runtime.core.core import Core
from sagellm.runtime.core.decision_log import DecisionReader, encode_effects, shown_effects
from sagellm.runtime.core.events import Event
from sagellm.runtime.operator import Encode
from sagellm.runtime.plan import plan


@dataclass(frozen=True, slots=True)
class Difference:
    """The first event whose effects differ; `number` counts from 1."""

    number: int
    now_s: float
    event: Event
    recorded: list[Any]
    replayed: list[Any]


@dataclass(frozen=True, slots=True)
class Replayed:
    """What a replay came to. `is_cut`: the log ends before its graph did."""

    num_events: int
    num_effects: int
    is_cut: bool
    difference: Difference | None = None


def replay(
    path: Path,
    *,
    functions: Mapping[str, Callable[..., Any]],
    overrides: Mapping[str, Any] | None = None,
) -> Replayed:
    """Replay a log, until effects differ. `overrides` change options of its graph.

    Raises OSError, LogError for a file that is no log, and GraphError for overrides that do not fit
    and for functions that are not registered.
    """
    with open(path, "rb") as file:
        reader = DecisionReader(file)
        header = reader.header
        graph = override(from_msgpack(header.graph), overrides or {})
        hold_s = math.inf if header.max_hold_s is None else header.max_hold_s
        encode = _encoder(graph)
        made = plan(
            graph,
            RESOLVER,
            header.engines,
            functions=functions,
            encode=encode,
            seed=header.seed,
            facts=header.facts,
            block_key=header.block_key or None,
        )
        core = Core(made, max_hold_s=hold_s)
        num_events = num_effects = 0
        for now, event, recorded in reader:
            effects = core.on(event, now)
            num_events += 1
            num_effects += len(effects)
            replayed = encode_effects(effects)
            if replayed != recorded:
                found = shown_effects(recorded), shown_effects(replayed)
                difference = Difference(num_events, now, event, *found)
                return Replayed(num_events, num_effects, reader.is_cut, difference)
        return Replayed(num_events, num_effects, reader.is_cut)


def _encoder(graph: Graph) -> Encode:
    """Encodes as the graph's models do, which are loaded when a function first needs one."""
    models = cache(lambda: load_models(graph))
    return lambda text, model: models().encode(text, model)
