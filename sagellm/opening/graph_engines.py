"""Reads kinds, options and descriptions of a graph's engines, and opens them in this process.

Worker processes load this module, so it imports neither sessions nor tokenizers.
"""

from collections.abc import Iterator, Mapping
from time import monotonic
from typing import Any

from sagellm.backends.interface import Progress, silent
from sagellm.graphs.ir import Graph
from sagellm.graphs.log import get_logger
from sagellm.graphs.rules.rule import EngineKindView
from sagellm.graphs.sections import engine_kind, kind_options
from sagellm.runtime.engine.kinds import KINDS, EngineDescription, EngineKind, ReplicaPlace
from sagellm.runtime.engine.options import EngineOptionError
from sagellm.runtime.port import Engine
from sagellm.runtime.registry import read_options

log = get_logger("sagellm.engine")


class KindViews(Mapping[str, EngineKindView]):
    """A view of each engine kind, by name, for the checks. A lookup imports the kind's module."""

    def __getitem__(self, name: str) -> EngineKindView:
        kind = KINDS[name]
        return EngineKindView(kind.options, kind.capabilities)

    def __contains__(self, name: object) -> bool:
        return name in KINDS

    def __iter__(self) -> Iterator[str]:
        return iter(KINDS)

    def __len__(self) -> int:
        return len(KINDS)


async def open_engines(graph: Graph, progress: Progress = silent) -> dict[str, tuple[Engine, ...]]:
    """Open every replica of every engine in this process, one after another.

    Raises ModelError, EngineOptionError.
    """
    engines: dict[str, tuple[Engine, ...]] = {}
    for name in graph.engines:
        places = (
            ReplicaPlace(name, replica, progress=progress, may_abandon=True)
            for replica in range(num_replicas(graph, name))
        )
        engines[name] = tuple([await _open_logged(graph, place) for place in places])
    return engines


def kind_of(graph: Graph, name: str) -> EngineKind:
    """The kind of an engine. Raises EngineOptionError, BrokenEntryPoint."""
    try:
        return KINDS.find(engine_kind(graph.engines[name]))
    except ValueError as error:
        raise EngineOptionError(str(error)) from error


def engine_options(graph: Graph, name: str) -> Any:
    """The options of an engine, as an instance of the dataclass that its kind declares.

    Raises EngineOptionError, OptionError.
    """
    return read_options(kind_of(graph, name).options, kind_options(graph.engines[name]))


def num_replicas(graph: Graph, name: str) -> int:
    """The number of replicas of an engine."""
    # A registered kind may have no option `replicas`.
    return int(getattr(engine_options(graph, name), "replicas", 1))


def describe_engine(graph: Graph, name: str) -> EngineDescription:
    """The facts of an engine that are known before the engine opens. Reads no weights.

    Raises EngineOptionError, OptionError, ModelError, UnsupportedModel.
    """
    return kind_of(graph, name).described(engine_options(graph, name))


async def open_replica(graph: Graph, place: ReplicaPlace) -> Engine:
    """Open one replica. Raises EngineOptionError, ModelError, UnsupportedModel."""
    return await kind_of(graph, place.engine).open(engine_options(graph, place.engine), place)


async def _open_logged(graph: Graph, place: ReplicaPlace) -> Engine:
    began_s = monotonic()
    engine = await open_replica(graph, place)
    log.info(
        "engine_opened",
        engine=f"{place.engine}[{place.replica}]",
        model=engine.facts.model,
        num_blocks=engine.facts.num_blocks,
        max_model_len=engine.facts.max_model_len,
        seconds=round(monotonic() - began_s, 3),
    )
    return engine
