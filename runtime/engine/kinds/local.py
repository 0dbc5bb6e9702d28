"""The kind `local`: our own engine on a device of this machine."""

import importlib
from collections.abc import Sequence
from dataclasses import replace

import trio

from sagellm.backends import Device, get_backend, list_available_backends
from sagellm.backends.interface import Progress, UnknownBackend, silent
from sagellm.graphs.vocabulary import nearest
from sagellm.runtime.engine.drafters import draft_folder
from sagellm.runtime.engine.kinds import EngineDescription, EngineKind, ReplicaPlace
from sagellm.runtime.engine.local_engine import LocalEngine
from sagellm.runtime.engine.options import (
    LOCAL_CAPABILITIES,
    EngineOptionError,
    EngineOptions,
    OnDevice,
)
from sagellm.runtime.engine.runner import EngineResources
from sagellm.runtime.engine.sizing import engine_facts, facts_view, resized, size, sizes
from sagellm.runtime.kv.transport import Sharing
from sagellm.runtime.models.folder import resolve_model

# Imported by name when an engine is opened: a graph is checked without what engines load.
_RESOURCES = "sagellm.runtime.engine.device_resources"


def open_engine(
    options: EngineOptions,
    *,
    name: str,
    replica: int = 0,
    sharing: Sharing | None = None,
    progress: Progress = silent,
) -> LocalEngine:
    """Open one replica, ready for `run`. Raises as `open_resources` does."""
    resources = open_resources(options, replica=replica, sharing=sharing, progress=progress)
    return LocalEngine(resources, name=name, replica=replica)


def open_resources(
    options: EngineOptions,
    *,
    replica: int = 0,
    sharing: Sharing | None = None,
    progress: Progress = silent,
) -> EngineResources:
    """Open the parts of one replica: load weights, lower the kernel graph, allocate the pool.

    `sharing`: how other processes reach the pool. `progress` is called with each event of the
    start. Blocks the thread for seconds. Raises EngineOptionError, ModelError, UnsupportedModel,
    LoweringError.
    """
    folder = resolve_model(options.model)
    device = open_device(options, replica)
    facts = engine_facts(options, folder, size(options, folder.facts, device.memory_bytes))
    resources: EngineResources = importlib.import_module(_RESOURCES).open_resources(
        options, folder, facts, device, sharing, progress
    )
    return resources


def open_device(options: OnDevice, replica: int = 0) -> Device:
    """The device of one replica. Raises EngineOptionError."""
    try:
        backend = get_backend(options.backend)
    except UnknownBackend:
        close = nearest(options.backend, list_available_backends())
        hint = f"did you mean {close}?" if close else "see `sagellm doctor`"
        raise EngineOptionError(f"device: {options.device!r} is not built; {hint}") from None
    names, index = backend.devices(), options.device_index
    if index is None:
        return backend.device(replica % max(1, len(names)))
    if index >= len(names):
        there = f"there are {', '.join(names)}" if names else "there is none"
        raise EngineOptionError(f"device: no {options.device} on this machine; {there}")
    return backend.device(index)


def prepare(devices: Sequence[str]) -> None:
    """Import the modules that engines on `devices` need, before the options of the engines are
    known.
    """
    if not devices:
        return
    importlib.import_module(_RESOURCES)
    for device in devices:
        get_backend(device.partition(":")[0])


async def _open(options: EngineOptions, place: ReplicaPlace) -> LocalEngine:
    # In a thread: loading weights takes seconds.
    return await trio.to_thread.run_sync(_load, options, place, abandon_on_cancel=place.may_abandon)


def _load(options: EngineOptions, place: ReplicaPlace) -> LocalEngine:
    return open_engine(
        resized(options, place.num_blocks),
        name=place.engine,
        replica=place.replica,
        sharing=place.sharing,
        progress=place.progress,
    )


def _describe(options: EngineOptions) -> EngineDescription:
    memory_bytes = open_device(options).memory_bytes
    folder = resolve_model(options.model)
    draft = draft_folder(options, folder)
    sizing = size(options, folder.facts, memory_bytes)
    return EngineDescription(
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
    """The number of devices that the replicas are spread over."""
    if options.device_index is not None:
        return 1
    return max(1, min(options.replicas, len(get_backend(options.backend).devices())))


KIND = EngineKind(EngineOptions, LOCAL_CAPABILITIES, _open, _describe)
