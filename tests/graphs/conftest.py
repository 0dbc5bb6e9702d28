"""A small vocabulary with specs like those of the operators."""

from dataclasses import dataclass, field
from typing import Literal

import pytest

from sagellm.graphs.vocabulary import (
    ANSWER,
    EMBEDDING,
    EVENT,
    PREFILLED,
    REQUEST,
    ListedPorts,
    OpSpec,
    Port,
    Vocabulary,
)


@dataclass(frozen=True, slots=True)
class Admission:
    max_queued: int = field(default=1024, metadata={"min": 1})


@dataclass(frozen=True, slots=True)
class Sorting:
    policy: Literal["fifo", "priority", "slo_aware"] = "fifo"
    window: int = field(default=8, metadata={"min": 1, "max": 64})
    share: float | None = None


@dataclass(frozen=True, slots=True)
class Splitting:
    min_uncached_tokens: int = field(default=32, metadata={"min": 0})


@dataclass(frozen=True, slots=True)
class Routing:
    strategy: Literal["load_balanced", "round_robin", "prefix_aware"] = "load_balanced"


@dataclass(frozen=True, slots=True)
class OnEngine:
    engine: str


@dataclass(frozen=True, slots=True)
class Function:
    function: str


@dataclass(frozen=True, slots=True)
class Models:
    models: tuple[str, ...]


MOVES = frozenset({"kv_transfer"})
SPECS = (
    OpSpec("admission", (Port("in", REQUEST),), (Port("out", REQUEST),), Admission),
    OpSpec("policy_sort", (Port("in", REQUEST),), (Port("out", REQUEST),), Sorting),
    OpSpec(
        "pd_split",
        (Port("in", REQUEST),),
        (Port("disaggregated", REQUEST), Port("aggregated", REQUEST)),
        Splitting,
    ),
    OpSpec("route", (Port("in", REQUEST),), (Port("out", REQUEST),), Routing),
    OpSpec(
        "prefill",
        (Port("in", REQUEST),),
        (Port("out", PREFILLED),),
        OnEngine,
        "service",
        engine=True,
        needs=MOVES,
    ),
    OpSpec("kv_transfer", (Port("in", PREFILLED),), (Port("out", PREFILLED),), role="service"),
    OpSpec("decode", (Port("in", PREFILLED),), (Port("out", EVENT),), role="service", engine=True),
    OpSpec("generate", (Port("in", REQUEST),), (Port("out", EVENT),), OnEngine, engine=True),
    OpSpec("embed", (Port("in", REQUEST),), (Port("out", EMBEDDING),), OnEngine, engine=True),
    OpSpec(
        "metrics_sink", (Port("in", f"{EVENT} | {ANSWER} | {EMBEDDING}"),), (Port("out", "same"),)
    ),
    OpSpec(
        "route_model",
        (Port("in", REQUEST),),
        (),
        Models,
        listed_outlets=ListedPorts("models", REQUEST),
    ),
    OpSpec("map", (Port("in"),), (Port("out", "same"),), Function),
    OpSpec("collect", (Port("in", EVENT),), (Port("out", ANSWER),)),
    OpSpec("join", (Port("left", REQUEST), Port("right", REQUEST)), (Port("out", REQUEST),)),
)


@pytest.fixture(scope="session")
def vocabulary() -> Vocabulary:
    return Vocabulary({spec.name: spec for spec in SPECS})
