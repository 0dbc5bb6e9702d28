"""Opening an engine that computes: from its options to what it works with."""

import importlib

from sagellm.backends import Device, get_backend, list_available_backends
from sagellm.backends.progress import Progress, silent
from sagellm.graphs.vocabulary import nearest
from sagellm.runtime.engine.local import LocalEngine
from sagellm.runtime.engine.options import EngineOptionError, EngineOptions
from sagellm.runtime.engine.sizing import engine_facts, size
from sagellm.runtime.kv.transport import Sharing
from sagellm.runtime.models.folder import ModelFolder, resolve_model
from sagellm.runtime.port import EngineFacts

# By name, so that a graph can be checked without loading torch.
_RESOURCES = "sagellm.runtime.engine.device_resources"


def open_engine(
    options: EngineOptions,
    *,
    name: str,
    replica: int = 0,
    sharing: Sharing | None = None,
    progress: Progress = silent,
) -> LocalEngine:
    """One replica, ready for `run`: loads weights, lowers the kernel graph, allocates the pool.

    `sharing`: other processes reach the pool through that. `progress` is called with each event.
    Takes seconds without a checkpoint. Raises EngineOptionError, ModelError, UnsupportedModel,
    LoweringError.
    """
    folder = resolve_model(options.model)
    device = open_device(options, replica)
    facts = facts_of(options, folder, device)
    opened = importlib.import_module(_RESOURCES).open_resources
    resources = opened(options, folder, facts, device, sharing, progress)
    return LocalEngine(resources, name=name, replica=replica)


def open_device(options: EngineOptions, replica: int = 0) -> Device:
    """The device of one replica. Raises EngineOptionError."""
    known = list_available_backends()
    if options.backend not in known:
        close = nearest(options.backend, known)
        hint = f"did you mean {close}?" if close else "see `sagellm doctor`"
        raise EngineOptionError(f"device: {options.device!r} is not built; {hint}")
    backend = get_backend(options.backend)
    names, index = backend.devices(), options.device_index
    if index is None:
        return backend.device(replica % max(1, len(names)))
    if index >= len(names):
        there = f"there are {', '.join(names)}" if names else "there is none"
        raise EngineOptionError(f"device: no {options.device} on this machine; {there}")
    return backend.device(index)


def facts_of(
    options: EngineOptions, folder: ModelFolder, device: Device | None = None
) -> EngineFacts:
    """The facts that an engine opened now would have; reads no weight. Raises EngineOptionError."""
    memory_bytes = (device or open_device(options)).memory_bytes
    return engine_facts(options, folder, size(options, folder.facts, memory_bytes))
