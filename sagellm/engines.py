"""Opens the engines of a checked graph."""

import gc
import importlib
import sys
from collections.abc import Sequence
from time import monotonic

import trio

from sagellm.backends import get_backend
from sagellm.backends.progress import Progress, silent
from sagellm.graphs.ir import FrozenMap, Graph
from sagellm.graphs.log import get_logger
from sagellm.runtime.engine.local import LocalEngine
from sagellm.runtime.engine.opening import open_engine
from sagellm.runtime.engine.options import EngineOptions
from sagellm.runtime.kv.transport import Sharing
from sagellm.runtime.options import read_options
from sagellm.runtime.port import Engine

log = get_logger("sagellm.engine")


async def open_engines(graph: Graph, progress: Progress = silent) -> dict[str, tuple[Engine, ...]]:
    """Every replica of every engine, in this process. Raises ModelError, EngineOptionError."""
    engines: dict[str, tuple[Engine, ...]] = {}
    for name in graph.engines:
        options = engine_options(graph, name)
        engines[name] = tuple(
            [await _opened(options, name, replica, progress) for replica in range(options.replicas)]
        )
    return engines


def engine_options(graph: Graph, name: str) -> EngineOptions:
    """Raises EngineOptionError."""
    values = graph.engines[name]
    return read_options(EngineOptions, values if isinstance(values, FrozenMap) else {})


async def _opened(options: EngineOptions, name: str, replica: int, progress: Progress) -> Engine:
    began_s = monotonic()
    engine = await _loaded(options, name, replica, progress)
    log.info(
        "engine_opened",
        engine=f"{name}[{replica}]",
        model=options.model,
        num_blocks=engine.facts.num_blocks,
        max_model_len=engine.facts.max_model_len,
        seconds=round(monotonic() - began_s, 3),
    )
    return engine


async def _loaded(options: EngineOptions, name: str, replica: int, progress: Progress) -> Engine:
    """Loading weights takes seconds, in a thread, which a cancelled opening does not wait for; the
    null engine is there at once.
    """
    if options.is_null:
        return open_engine(options, name=name, replica=replica)
    return await trio.to_thread.run_sync(
        load_replica, options, name, replica, None, progress, abandon_on_cancel=True
    )


def load_replica(
    options: EngineOptions,
    name: str,
    replica: int,
    sharing: Sharing | None = None,
    progress: Progress = silent,
) -> LocalEngine:
    """One replica, ready to run; takes seconds where it computes. See `open_engine`."""
    if not options.is_null:
        _import_torch()
    return open_engine(options, name=name, replica=replica, sharing=sharing, progress=progress)


def prepare(devices: Sequence[str]) -> None:
    """Import what engines on those devices need, before it is known what they load."""
    if not devices:
        return
    _import_torch()
    importlib.import_module("sagellm.runtime.engine.device_resources")
    for device in devices:
        get_backend(device)


def _import_torch() -> None:
    """Once a process, before anything else is loaded, and without collections of cycles.

    They would go over its hundreds of thousands of objects again and again, which stay: now, and
    whenever a server collects later. So these are frozen, with whatever else is alive.
    """
    if "torch" in sys.modules or not gc.isenabled():
        return
    gc.collect()  # what is garbage now would be frozen too
    gc.disable()
    try:
        importlib.import_module("torch")
        gc.freeze()
    finally:
        gc.enable()
