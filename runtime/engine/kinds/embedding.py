"""The kind `embedding`: our own engine that embeds texts, on a device of this machine."""

import threading
from dataclasses import dataclass, field
from typing import get_args
from weakref import WeakValueDictionary

import trio

from sagellm.backends.interface import Device, Program, Progress
from sagellm.backends.text_batches import NO_KV, EmbeddingDevice
from sagellm.graphs.kernels.token_mixers import Pooling
from sagellm.graphs.models import build
from sagellm.graphs.rules.rule import EngineFactsView
from sagellm.graphs.vocabulary import EMBED, TOKENS_IN
from sagellm.runtime.engine.embedding_engine import EmbeddingEngine, EmbeddingResources
from sagellm.runtime.engine.kinds import EngineDescription, EngineKind, ReplicaPlace
from sagellm.runtime.engine.kinds.local import open_device
from sagellm.runtime.engine.options import (
    EngineOptionError,
    OnDevice,
    check_known,
    check_least,
    float_dtype,
)
from sagellm.runtime.models.embedding_files import HeadOptions
from sagellm.runtime.models.folder import ModelFolder, resolve_model
from sagellm.runtime.models.stored_weights import open_weights, weight_names
from sagellm.runtime.port import EngineFacts

CAPABILITIES = frozenset({TOKENS_IN, EMBED})

# Replicas in one process share weights and program, as long as one of them lives.
_programs: "WeakValueDictionary[tuple[object, ...], Program]" = WeakValueDictionary()
_loading = threading.Lock()


@dataclass(frozen=True, slots=True)
class EmbeddingOptions(OnDevice):
    """The options of kind `embedding`. Raises EngineOptionError for invalid values.

    `model`: a built-in name, a folder or a Hub id. `pooling`, one of "cls", "mean" and "last", and
    `normalize`: how rows become a vector; None: as the folder says. `dtype` None: the model's own.
    `max_model_len`: the most tokens of a text; None: the model's own limit. `max_num_seqs`: the
    most texts in the engine. `max_num_batched_tokens`: the most tokens of a batch; a longer text is
    a batch of its own. `device` and `threads` as of kind `local`.
    """

    model: str
    pooling: Pooling | None = None
    normalize: bool | None = None
    dtype: str | None = None
    max_model_len: int | None = field(default=None, metadata={"min": 1})
    max_num_seqs: int = field(default=1024, metadata={"min": 1})
    max_num_batched_tokens: int = field(default=4096, metadata={"min": 1})
    device: str = "cpu"
    threads: int | None = field(default=None, metadata={"min": 1})
    replicas: int = field(default=1, metadata={"min": 1})

    def __post_init__(self) -> None:
        check_least(self)
        self.check_device()
        if self.pooling is not None:
            check_known("pooling", self.pooling, get_args(Pooling), " or ")

    @property
    def head(self) -> HeadOptions:
        return HeadOptions(self.pooling, self.normalize)


def describe(options: EmbeddingOptions) -> EngineDescription:
    """Raises EngineOptionError, ModelError, UnsupportedModel."""
    _embedding_device(options, 0)
    folder = resolve_model(options.model, options.head)
    view = EngineFactsView(
        dtype=float_dtype(options.dtype, folder.facts.dtype),
        max_model_len=_longest(options, folder),
        device=options.device,
        replicas=options.replicas,
        capabilities=CAPABILITIES,
    )
    return EngineDescription(view, options.model, folder, folder.warnings)


async def open_embedding(options: EmbeddingOptions, place: ReplicaPlace) -> EmbeddingEngine:
    """Raises EngineOptionError, ModelError, UnsupportedModel, LoweringError."""
    # In a thread: loading weights takes seconds.
    resources = await trio.to_thread.run_sync(
        open_resources, options, place, abandon_on_cancel=place.may_abandon
    )
    return EmbeddingEngine(resources, name=place.engine, replica=place.replica)


def open_resources(options: EmbeddingOptions, place: ReplicaPlace) -> EmbeddingResources:
    """Load weights and lower the kernel graph. Blocks the thread for seconds."""
    folder = resolve_model(options.model, options.head)
    assert folder.head is not None
    device = _embedding_device(options, place.replica)
    dtype = float_dtype(options.dtype, folder.facts.dtype)
    facts = EngineFacts(
        model=options.model,
        max_model_len=_longest(options, folder),
        max_num_seqs=options.max_num_seqs,
        capabilities=CAPABILITIES,
        model_hash=f"{folder.hash}-{dtype}",
        vector_len=folder.facts.hidden_size,
    )
    assert isinstance(device, EmbeddingDevice)
    return EmbeddingResources(
        facts,
        device,
        _program(folder, device, dtype, place.progress),
        folder.facts.vocab_size,
        options.max_num_batched_tokens,
        folder.head.is_unit,
        options.threads,
    )


def _longest(options: EmbeddingOptions, folder: ModelFolder) -> int:
    limit = folder.facts.max_model_len
    if options.max_model_len is not None and options.max_model_len > limit:
        raise EngineOptionError(
            f"max_model_len: the model was made for {limit} tokens, not {options.max_model_len}"
        )
    return options.max_model_len or limit


def _embedding_device(options: EmbeddingOptions, replica: int) -> Device:
    device = open_device(options, replica)
    if not isinstance(device, EmbeddingDevice):
        raise EngineOptionError(f"device: {options.backend} does not embed; use cpu")
    return device


def _program(folder: ModelFolder, device: Device, dtype: str, progress: Progress) -> Program:
    key = folder.path, folder.hash, device.name, dtype
    with _loading:  # replicas that open at the same time must not load the same weights twice
        program = _programs.get(key)
        if program is None:
            program = _programs[key] = _lower(folder, device, dtype, progress)
        return program


def _lower(folder: ModelFolder, device: Device, dtype: str, progress: Progress) -> Program:
    graph = build(folder.config, folder.head)
    weights = open_weights(folder, progress)
    weights.require(weight_names(graph))
    program = device.lower(
        graph, weights, layout=NO_KV, dtype=dtype, deterministic=False, progress=progress
    )
    weights.loaded()
    weights.give_back()
    return program


KIND = EngineKind(EmbeddingOptions, CAPABILITIES, open_embedding, describe)
