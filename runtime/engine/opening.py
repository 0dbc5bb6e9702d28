"""Opening an engine: from its options to what it works with."""

import threading
from weakref import WeakValueDictionary

from sagellm.backends import KVLayout, get_backend
from sagellm.graphs.models import build
from sagellm.runtime.engine.detokenizer import IncrementalDetokenizer
from sagellm.runtime.engine.local import Equipment, LocalEngine, OpenTranscript
from sagellm.runtime.engine.null_runner import NullRunner
from sagellm.runtime.engine.options import EngineOptions
from sagellm.runtime.engine.port import EngineFacts
from sagellm.runtime.engine.scheduler import Limits
from sagellm.runtime.engine.sizing import engine_dtype, engine_facts, size
from sagellm.runtime.engine.torch_runner import SharedProgram, TorchRunner
from sagellm.runtime.engine.transcript import Transcript
from sagellm.runtime.kv.storage import NullStorage
from sagellm.runtime.kv.tensor_storage import TensorStorage
from sagellm.runtime.messages import SequenceState
from sagellm.runtime.models.folder import ModelFolder, resolve_model
from sagellm.runtime.models.tokenizer import Tokenizer, load_tokenizer
from sagellm.runtime.models.weights import Weights, weight_names

NULL_MEMORY_BYTES = 1 << 40  # nothing is stored

# Engines of one process that compute the same function share weights and program as long as one
# of them lives; what is in here is never changed, so nothing can go stale.
_programs: "WeakValueDictionary[tuple[object, ...], SharedProgram]" = WeakValueDictionary()
_loading = threading.Lock()


def open_engine(options: EngineOptions, *, name: str, replica: int = 0) -> LocalEngine:
    """One replica, ready for `run`: loads weights, lowers the kernel graph, allocates the pool.

    Takes seconds without a checkpoint. Raises EngineOptionError, ModelError, UnsupportedModel,
    UnknownBackend, LoweringError.
    """
    folder = resolve_model(options.model)
    open_equipment = _null_equipment if options.is_null else _torch_equipment
    return LocalEngine(open_equipment(options, folder), name=name, replica=replica)


def facts_of(options: EngineOptions, folder: ModelFolder) -> EngineFacts:
    """The facts that an engine opened now would have; reads no weight. Raises EngineOptionError."""
    memory_bytes = (
        NULL_MEMORY_BYTES if options.is_null else get_backend(options.device).memory_bytes()
    )
    return engine_facts(options, folder, size(options, folder.facts, memory_bytes))


def _null_equipment(options: EngineOptions, folder: ModelFolder) -> Equipment:
    facts = facts_of(options, folder)
    token_s = 1e-4 if options.prefill_token_s is None else options.prefill_token_s
    step_s = 0.01 if options.decode_step_s is None else options.decode_step_s
    return Equipment(
        facts,
        _limits(options),
        NullRunner(folder.facts.vocab_size, token_s, step_s),
        NullStorage(facts.kv_block_bytes, options.kv_bytes_per_s or 10e9),
        folder.facts.vocab_size,
    )


def _torch_equipment(options: EngineOptions, folder: ModelFolder) -> Equipment:
    facts = facts_of(options, folder)
    layout = _layout(options, folder)
    tokenizer = load_tokenizer(folder)
    program = _program(options, folder, layout)
    pool = get_backend(options.device).allocate_pool(layout, facts.num_blocks)
    return Equipment(
        facts,
        _limits(options),
        TorchRunner(program, pool, options.block_size, options.threads),
        TensorStorage(pool),
        folder.facts.vocab_size,
        frozenset(folder.eos_token_ids),
        _transcripts(tokenizer),
    )


def _program(options: EngineOptions, folder: ModelFolder, layout: KVLayout) -> SharedProgram:
    key = (folder.path, folder.hash, options.device, layout, options.deterministic)
    with _loading:
        program = _programs.get(key)
        if program is None:
            program = _programs[key] = _lower(options, folder, layout)
        return program


def _lower(options: EngineOptions, folder: ModelFolder, layout: KVLayout) -> SharedProgram:
    graph = build(folder.config)
    weights = Weights(folder)
    weights.require(weight_names(graph))
    return SharedProgram(
        get_backend(options.device).lower(
            graph,
            weights,
            layout=layout,
            dtype=layout.dtype,
            deterministic=options.deterministic,
        )
    )


def _layout(options: EngineOptions, folder: ModelFolder) -> KVLayout:
    facts = folder.facts
    return KVLayout(
        num_layers=facts.num_layers,
        num_kv_heads=facts.num_kv_heads,
        head_dim=facts.head_dim,
        block_size=options.block_size,
        dtype=engine_dtype(options, facts),
    )


def _limits(options: EngineOptions) -> Limits:
    return Limits(options.max_num_seqs, options.max_step_tokens, options.prefill_chunk)


def _transcripts(tokenizer: Tokenizer) -> OpenTranscript:
    """How to begin the text of a sequence, behind what it has already emitted."""

    def open_transcript(state: SequenceState) -> Transcript:
        sampling = state.sampling

        def decode(token_ids: list[int]) -> str:
            return tokenizer.decode(token_ids, skip_special_tokens=sampling.skip_special_tokens)

        transcript = Transcript(
            IncrementalDetokenizer(decode),
            sampling.stop,
            min_tokens=sampling.min_tokens,
            keep_stop=sampling.include_stop_str_in_output,
        )
        transcript.replay(state.emitted_token_ids)
        return transcript

    return open_transcript
