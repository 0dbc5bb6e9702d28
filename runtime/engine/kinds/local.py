"""The kind `local`: our own engine, on a device of this machine."""

import gc
import importlib
import sys
from collections.abc import Sequence
from dataclasses import replace

import trio

from sagellm.backends import get_backend
from sagellm.runtime.engine.kinds.kind import Described, EngineKind, Place
from sagellm.runtime.engine.kinds.paged import facts_view, resized, sizes
from sagellm.runtime.engine.local import LocalEngine
from sagellm.runtime.engine.opening import open_device, open_engine
from sagellm.runtime.engine.options import LOCAL_CAPABILITIES, EngineOptions
from sagellm.runtime.engine.sizing import size
from sagellm.runtime.engine.speculation.draft_folder import draft_folder
from sagellm.runtime.models.folder import resolve_model


async def _open(options: EngineOptions, place: Place) -> LocalEngine:
    """Loading weights takes seconds, in a thread."""
    return await trio.to_thread.run_sync(_load, options, place, abandon_on_cancel=place.may_abandon)


def _load(options: EngineOptions, place: Place) -> LocalEngine:
    _import_torch()
    return open_engine(
        resized(options, place.num_blocks),
        name=place.engine,
        replica=place.replica,
        sharing=place.sharing,
        progress=place.progress,
    )


def _describe(options: EngineOptions) -> Described:
    memory_bytes = open_device(options).memory_bytes
    folder = resolve_model(options.model)
    draft = draft_folder(options, folder)
    sizing = size(options, folder.facts, memory_bytes)
    return Described(
        replace(
            facts_view(options, folder, sizing, pool_bytes=sizing.pool_bytes),
            device=options.device,
            memory_bytes=memory_bytes * _num_devices(options),
        ),
        options.model,
        folder,
        (*folder.warnings, *(draft.warnings if draft else ())),
        sizes(options, sizing),
    )


def _num_devices(options: EngineOptions) -> int:
    """Over how many devices the replicas are spread."""
    if options.device_index is not None:
        return 1
    return max(1, min(options.replicas, len(get_backend(options.backend).devices())))


KIND = EngineKind(EngineOptions, LOCAL_CAPABILITIES, _open, _describe)


def prepare(devices: Sequence[str]) -> None:
    """Import what engines on those devices need, before it is known what they load."""
    if not devices:
        return
    _import_torch()
    importlib.import_module("sagellm.runtime.engine.device_resources")
    for device in devices:
        get_backend(device.partition(":")[0])


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
