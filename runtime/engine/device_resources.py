"""The resources of an engine that computes: program, KV pool, queue, tokenizer, drafter."""

import importlib
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import TYPE_CHECKING
from weakref import WeakValueDictionary

from sagellm.backends import Device, KVLayout, Program, get_backend
from sagellm.backends.arrays import release_freed_memory
from sagellm.backends.interface import Loading, Progress, ProgressEvent, silent
from sagellm.graphs.kernels import KVBlocks, KVGroup
from sagellm.graphs.models import build
from sagellm.graphs.passes import PlaceLayers
from sagellm.runtime.engine.drafters import DraftLimits, ModelDrafter, NgramDrafter, draft_folder
from sagellm.runtime.engine.grammar_queue import LateCompiler
from sagellm.runtime.engine.options import EngineOptionError, EngineOptions
from sagellm.runtime.engine.output import IncrementalDetokenizer, OutputText
from sagellm.runtime.engine.runner import DeviceQueue, DeviceRunner, EngineResources, OpenOutputText
from sagellm.runtime.engine.sizing import engine_dtype, kv_blocks, kv_dtype
from sagellm.runtime.engine.speculation import Drafter, Speculation
from sagellm.runtime.kv.memory import DeviceStorage, PoolBytes
from sagellm.runtime.kv.pool import BlockPool
from sagellm.runtime.kv.transport import Sharing
from sagellm.runtime.kv.transports import open_transport, pool_memory
from sagellm.runtime.messages import SequenceState
from sagellm.runtime.models.folder import ModelFolder
from sagellm.runtime.models.stored_weights import open_weights, weight_names
from sagellm.runtime.models.tokenizer import Tokenizer, load_tokenizer
from sagellm.runtime.port import EngineFacts

if TYPE_CHECKING:
    from sagellm.runtime.grammars.grammar_compiler import GrammarCompiler

_COMPILER = "sagellm.runtime.grammars.grammar_compiler"  # imported with the first grammar

# Engines of one process that compute the same function share weights and program, as long as one
# of them lives. Programs never change, so no entry can go stale.
_programs: "WeakValueDictionary[tuple[object, ...], Program]" = WeakValueDictionary()
_loading = threading.Lock()


def open_resources(
    options: EngineOptions,
    folder: ModelFolder,
    facts: EngineFacts,
    device: Device,
    sharing: Sharing | None,
    progress: Progress = silent,
) -> EngineResources:
    """Load weights, lower the program, and allocate the pool. With `sharing`, other processes can
    read the pool. Raises EngineOptionError, ModelError, LoweringError.
    """
    blocks = kv_blocks(options, folder.facts)
    layout = _layout(options, folder, blocks)
    eos_token_ids = frozenset(folder.eos_token_ids)
    with _TokenizerBeside(folder, progress) as beside:
        program = _program(options, folder, blocks, device, beside.progress)
        tokenizer = beside.result()
    memory = pool_memory(sharing, facts.num_blocks * facts.kv_block_bytes)
    storage = device.allocate(layout, facts.num_blocks, memory.view if memory else None)
    pool = PoolBytes(storage, memory)
    transport = open_transport(sharing, pool) if sharing is not None else None
    runner = DeviceRunner(DeviceQueue(device, options.threads), program, storage)
    resources = EngineResources(
        facts,
        options.limits,
        runner,
        DeviceStorage(pool, transport),
        folder.facts.vocab_size,
        eos_token_ids,
        _output_text_opener(tokenizer),
        _speculation(options, folder, facts, device, runner),
        _grammars(tokenizer, folder.facts.vocab_size, eos_token_ids),
    )
    release_freed_memory()
    return resources


class _TokenizerBeside:
    """A context that reads a tokenizer on another thread while C packs weights.

    Reading holds Python's lock, so it waits for the first event of loading: Python has little to do
    for the weights then. An error of the tokenizer ends the loading at its next event.
    """

    def __init__(self, folder: ModelFolder, progress: Progress) -> None:
        self._folder = folder
        self._progress = progress
        self._may_read = threading.Event()
        self._is_over = False
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="sagellm-tokenizer")
        # A thread that started later would take the lock at once.
        self._reading = self._thread.submit(self._read)

    def __enter__(self) -> "_TokenizerBeside":
        return self

    def __exit__(self, *error: object) -> None:
        self._is_over = True
        self._may_read.set()
        self._thread.shutdown()

    def progress(self, event: ProgressEvent) -> None:
        """Report an event. Raises ModelError if the tokenizer cannot be read."""
        self._progress(event)
        if isinstance(event, Loading):
            self._may_read.set()
            if self._reading.done():
                self.result()

    def result(self) -> Tokenizer:
        """The tokenizer. Raises ModelError."""
        self._may_read.set()
        found = self._reading.result()
        assert found is not None
        return found

    def _read(self) -> Tokenizer | None:
        self._may_read.wait()
        return None if self._is_over else load_tokenizer(self._folder)


def _grammars(tokenizer: Tokenizer, vocab_size: int, eos_token_ids: frozenset[int]) -> LateCompiler:
    def make() -> "GrammarCompiler":
        compiler: GrammarCompiler = importlib.import_module(_COMPILER).GrammarCompiler(
            tokenizer, vocab_size, eos_token_ids
        )
        return compiler

    return LateCompiler(make)


def _speculation(
    options: EngineOptions,
    folder: ModelFolder,
    facts: EngineFacts,
    device: Device,
    runner: DeviceRunner,
) -> Speculation | None:
    if options.speculation is None:
        return None
    draft = draft_folder(options, folder)
    drafter: Drafter = NgramDrafter()
    if draft is not None:
        drafter = _model_drafter(options, draft, folder.facts.vocab_size, facts, device, runner)
    return Speculation(drafter, options.num_drafted)


def _model_drafter(
    options: EngineOptions,
    draft: ModelFolder,
    vocab_size: int,
    facts: EngineFacts,
    device: Device,
    runner: DeviceRunner,
) -> ModelDrafter:
    """A drafter on the engine's own queue. Its pool has as many blocks as the engine's pool."""
    blocks = _all_tokens(kv_blocks(options, draft.facts))
    vocab_size = min(vocab_size, draft.facts.vocab_size)
    storage = device.allocate(_layout(options, draft, blocks), facts.num_blocks)
    return ModelDrafter(
        replace(runner, program=_program(options, draft, blocks, device), storage=storage),
        BlockPool(facts.num_blocks, options.block_size),
        DraftLimits(vocab_size, draft.facts.max_model_len, options.max_num_batched_tokens),
    )


def _program(
    options: EngineOptions,
    folder: ModelFolder,
    blocks: KVBlocks,
    device: Device,
    progress: Progress = silent,
) -> Program:
    how = engine_dtype(options, folder.facts), options.deterministic, options.quantization
    key = (folder.path, folder.hash, device.name, blocks, options.kv_cache_dtype, *how)
    # Replicas that open at the same time must not load the same weights twice.
    with _loading:
        program = _programs.get(key)
        if program is None:
            program = _programs[key] = _lower(options, folder, blocks, device, progress)
        return program


def _lower(
    options: EngineOptions,
    folder: ModelFolder,
    blocks: KVBlocks,
    device: Device,
    progress: Progress,
) -> Program:
    graph, backend = build(folder.config), get_backend(options.backend)
    if options.quantization not in (None, *backend.quantizations):
        offered = ", ".join(backend.quantizations) or "none"
        raise EngineOptionError(
            f"quantization: device {backend.name} has no {options.quantization}; it has {offered}"
        )
    if options.kv_cache_dtype not in ("auto", *backend.kv_cache_dtypes):
        offered = ", ".join(("auto", *backend.kv_cache_dtypes))
        raise EngineOptionError(
            f"kv_cache_dtype: device {backend.name} has no {options.kv_cache_dtype}; "
            f"it has {offered}"
        )
    weights = open_weights(folder, progress)
    weights.require(weight_names(graph))
    layout = _layout(options, folder, blocks)
    program = device.lower(
        PlaceLayers(blocks).apply(graph),
        weights,
        layout=layout,
        dtype=engine_dtype(options, folder.facts),
        deterministic=options.deterministic,
        quantization=options.quantization,
        progress=progress,
    )
    weights.loaded()
    weights.give_back()  # kernels have copies; rows of an embedding are read again when needed
    return program


def _layout(options: EngineOptions, folder: ModelFolder, blocks: KVBlocks) -> KVLayout:
    return KVLayout(
        num_layers=blocks.block_layers,
        num_kv_heads=blocks.num_kv_heads,
        head_dim=blocks.head_dim,
        block_size=blocks.block_size,
        dtype=kv_dtype(options, folder.facts),
    )


def _all_tokens(blocks: KVBlocks) -> KVBlocks:
    """The same layers in one group of full attention: a draft model keeps tokens outside its
    windows too.
    """
    layers = sorted(layer for group in blocks.groups for layer in group.layers)
    return replace(blocks, groups=(KVGroup("full", tuple(layers)),))


def _output_text_opener(tokenizer: Tokenizer) -> OpenOutputText:
    """A function that opens the output text of a sequence. Text that was emitted before is not
    repeated.
    """

    def open_output_text(state: SequenceState) -> OutputText:
        sampling = state.sampling

        def decode(token_ids: list[int]) -> str:
            return tokenizer.decode(token_ids, skip_special_tokens=sampling.skip_special_tokens)

        output_text = OutputText(
            IncrementalDetokenizer(decode),
            sampling.stop,
            min_tokens=sampling.min_tokens,
            keep_stop=sampling.include_stop_str_in_output,
        )
        output_text.replay(state.emitted_token_ids)
        return output_text

    return open_output_text
