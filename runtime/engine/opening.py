"""Opening an engine: from its options to what it works with."""

import importlib

from sagellm.backends import get_backend
from sagellm.backends.progress import Progress, silent
from sagellm.runtime.engine.equipment import Equipment
from sagellm.runtime.engine.local import LocalEngine
from sagellm.runtime.engine.null_runner import NullRunner
from sagellm.runtime.engine.options import EngineOptions
from sagellm.runtime.engine.port import EngineFacts
from sagellm.runtime.engine.sizing import engine_facts, size
from sagellm.runtime.kv.storage import NullStorage
from sagellm.runtime.kv.transport import Sharing
from sagellm.runtime.models.folder import ModelFolder, resolve_model

NULL_MEMORY_BYTES = 1 << 40  # nothing is stored

# By name, so that a graph can be checked, and the null engine opened, without loading torch.
_TORCH = "sagellm.runtime.engine.torch_equipment"


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
    UnknownBackend, LoweringError.
    """
    folder = resolve_model(options.model)
    facts = facts_of(options, folder)
    if options.is_null:
        equipment = _null_equipment(options, folder, facts)
    else:
        equip = importlib.import_module(_TORCH).equip
        equipment = equip(options, folder, facts, sharing, progress)
    return LocalEngine(equipment, name=name, replica=replica)


def facts_of(options: EngineOptions, folder: ModelFolder) -> EngineFacts:
    """The facts that an engine opened now would have; reads no weight. Raises EngineOptionError."""
    memory_bytes = (
        NULL_MEMORY_BYTES if options.is_null else get_backend(options.device).memory_bytes()
    )
    return engine_facts(options, folder, size(options, folder.facts, memory_bytes))


def _null_equipment(options: EngineOptions, folder: ModelFolder, facts: EngineFacts) -> Equipment:
    token_s = 1e-4 if options.prefill_token_s is None else options.prefill_token_s
    step_s = 0.01 if options.decode_step_s is None else options.decode_step_s
    num_layers = folder.facts.num_layers
    return Equipment(
        facts,
        options.limits,
        NullRunner(folder.facts.vocab_size, token_s, step_s, num_layers),
        NullStorage(facts.kv_block_bytes, options.kv_bytes_per_s or 10e9, num_layers),
        folder.facts.vocab_size,
    )
