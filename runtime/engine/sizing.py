"""Sizes and facts of a paged KV pool, derived from options and a model's config."""

import hashlib
from dataclasses import dataclass, replace
from typing import TypeVar

import msgspec

from sagellm.backends.quantised_weight import GROUP_SIZE, LOGITS_MODES, MODES
from sagellm.graphs.kernels import KVBlocks, KVGroup
from sagellm.graphs.kernels.memory_layout import ITEM_BYTES, SCALE_BYTES
from sagellm.graphs.models import ModelFacts
from sagellm.graphs.rules.rule import EngineFactsView
from sagellm.runtime.engine.options import (
    EngineOptionError,
    PagedOptions,
    SizedOptions,
    float_dtype,
    num_bytes,
)
from sagellm.runtime.lease_shape import LeaseShape, TokenGroup
from sagellm.runtime.models.folder import ModelFolder
from sagellm.runtime.port import EngineFacts

_MEMORY_PART = 0.25  # of free memory: the rest is for weights, activations and other engines
_LEAST_PART = 0.05  # of free memory, if weights seem to leave less: they may be loaded already
_STEPS_UNDER_WAY = 2  # with async scheduling: one step computes, the next is launched
_NUM_LONGEST = 8  # sequences of full length that the default pool holds, with all windows
_SHORTEST = 2  # a prompt of one token, and its answer

P = TypeVar("P", bound=PagedOptions)


@dataclass(frozen=True, slots=True)
class Sizing:
    """The pool size and the context limit of one replica. Engines of one model share the weights,
    which take `weight_bytes` once.
    """

    num_blocks: int
    max_model_len: int
    block_bytes: int
    weight_bytes: int

    @property
    def pool_bytes(self) -> int:
        return self.num_blocks * self.block_bytes


def engine_dtype(options: SizedOptions, facts: ModelFacts) -> str:
    """The dtype of weights, and of KV by default. Float16 models are computed in float32. Raises
    EngineOptionError.
    """
    return float_dtype(options.dtype, facts.dtype)


def kv_dtype(options: SizedOptions, facts: ModelFacts) -> str:
    """The dtype of keys and values. Raises EngineOptionError."""
    dtype = engine_dtype(options, facts)
    return dtype if options.kv_cache_dtype == "auto" else options.kv_cache_dtype


def size(options: SizedOptions, facts: ModelFacts, memory_bytes: int) -> Sizing:
    """Size the pool for `memory_bytes` of free memory.

    The pool must hold one sequence of full length, so that some sequence can always advance. If no
    option sets the pool size or the context limit, the context limit shrinks to the tokens that the
    memory holds. Raises EngineOptionError.
    """
    block_bytes, shape = kv_blocks(options, facts).block_bytes, lease_shape(options, facts)
    longest = min(options.max_model_len or facts.max_model_len, facts.max_model_len)
    if options.max_model_len and options.max_model_len > facts.max_model_len:
        raise EngineOptionError(
            f"max_model_len: the model was made for {facts.max_model_len} tokens, "
            f"not {options.max_model_len}"
        )
    weights = weight_bytes(options, facts)
    left = max(memory_bytes - weights, memory_bytes * _LEAST_PART)
    affordable = int(min(memory_bytes * _MEMORY_PART, left)) // block_bytes
    if options.num_blocks is not None:
        num_blocks = options.num_blocks
    elif options.kv_memory is not None:
        num_blocks = num_bytes(options.kv_memory) // block_bytes
    else:
        fixed = options.max_num_seqs * shape.num_fixed(longest)
        num_blocks = min(affordable, _NUM_LONGEST * shape.num_needed(longest) + fixed)
        if options.max_model_len is None and num_blocks > 0:
            longest = shape.num_tokens(num_blocks, longest) or longest
    _check_room(num_blocks, longest, options, block_bytes, shape)
    return Sizing(num_blocks, longest, block_bytes, weights)


def kv_blocks(options: SizedOptions, facts: ModelFacts) -> KVBlocks:
    """The layout of the model's KV groups in the blocks of a pool."""
    groups = facts.kv_groups or (KVGroup("full", tuple(range(facts.num_layers))),)
    dtype = kv_dtype(options, facts)
    sizes = facts.num_kv_heads, facts.head_dim, options.block_size, ITEM_BYTES[dtype]
    return KVBlocks(groups, *sizes, scale_bytes=SCALE_BYTES if dtype == "int8" else 0)


def lease_shape(options: SizedOptions, facts: ModelFacts) -> LeaseShape:
    """The shape of leases: how many blocks of a pool a sequence takes."""
    blocks = kv_blocks(options, facts)
    return LeaseShape(
        options.block_size,
        tuple(TokenGroup(blocks.num_tables(one), one.window) for one in blocks.token_groups),
        blocks.num_state_blocks,
        _STEPS_UNDER_WAY * options.limits.max_chunk,
    )


def _check_room(
    num_blocks: int, longest: int, options: SizedOptions, block_bytes: int, shape: LeaseShape
) -> None:
    needed = shape.num_needed(longest)
    if num_blocks >= needed:
        return
    room = shape.num_tokens(num_blocks, longest)
    mebibytes = -(-needed * block_bytes // 2**20)
    fixes = [f"max_model_len: {room} or less"] if room >= _SHORTEST else []
    if options.num_blocks is not None:
        fixes.append(f"num_blocks: {needed} or more")
    else:
        fixes.append(f"kv_memory: {mebibytes}MiB or more")
    raise EngineOptionError(
        f"the KV pool has {num_blocks} blocks: {room} tokens, fewer than one sequence of "
        f"{longest}; set {', or '.join(fixes)}"
    )


def weight_bytes(options: SizedOptions, facts: ModelFacts) -> int:
    """The memory of loaded weights, in bytes. Norms and biases are counted like weights of linears.

    The embedding stays as it is stored, even if its copy for the logits is quantised.
    """
    itemsize = 4 if engine_dtype(options, facts) == "float32" else 2
    table = facts.vocab_size * facts.hidden_size
    layers = facts.num_parameters - table * (1 if facts.tie_embeddings else 2)
    if options.quantization is not None:
        of_layers, of_logits = (
            _weight_bytes(modes[options.quantization].weight_bits)
            for modes in (MODES, LOGITS_MODES)
        )
        return int(table * itemsize + table * of_logits + layers * of_layers)
    stored = facts.weight_bits / 8 if facts.weight_bits else itemsize
    return int((facts.num_parameters - layers) * itemsize + layers * stored)


def _weight_bytes(bits: int) -> float:
    """Bytes of one weight of `bits` bits, with its share of the group's scale in float16."""
    return (bits + 16 / GROUP_SIZE) / 8


def engine_facts(options: SizedOptions, folder: ModelFolder, sizing: Sizing) -> EngineFacts:
    """The facts of an engine for graph checks and operators. Reads no weight. Raises
    EngineOptionError.
    """
    dtype = engine_dtype(options, folder.facts)
    if options.quantization is not None and folder.facts.weight_bits:
        raise EngineOptionError(
            f"quantization: the weights of {options.model} are stored in few bits already; drop it"
        )
    how = [] if options.quantization is None else [options.quantization]
    return EngineFacts(
        model=options.model,
        model_hash=_digest([folder.hash, dtype, *how]),
        block_size=options.block_size,
        num_blocks=sizing.num_blocks,
        max_model_len=sizing.max_model_len,
        max_num_seqs=options.max_num_seqs,
        kv_block_bytes=sizing.block_bytes,
        layout_hash=_layout_hash(options, folder.facts),
        capabilities=options.capabilities,
        lease_shape=lease_shape(options, folder.facts),
    )


def _layout_hash(options: SizedOptions, facts: ModelFacts) -> str:
    """A hash that is equal for pools that can exchange blocks."""
    blocks = kv_blocks(options, facts)
    shape = [blocks.num_kv_heads, blocks.head_dim, blocks.block_size, kv_dtype(options, facts)]
    return _digest([*shape, blocks.block_layers, list(map(str, blocks.groups))])


def _digest(value: object) -> str:
    return hashlib.blake2b(msgspec.json.encode(value), digest_size=8).hexdigest()


def resized(options: P, num_blocks: int | None) -> P:
    """The options with a pool of `num_blocks`; unchanged options if `num_blocks` is None."""
    return (
        options if num_blocks is None else replace(options, num_blocks=num_blocks, kv_memory=None)
    )


def sizes(options: PagedOptions, sizing: Sizing) -> dict[str, int]:
    """The options that fix the size of the pool, if the user left the size to the memory; else
    none.
    """
    if options.num_blocks is not None or options.kv_memory is not None:
        return {}
    return {"num_blocks": sizing.num_blocks, "max_model_len": sizing.max_model_len}


def facts_view(
    options: SizedOptions, folder: ModelFolder, sizing: Sizing, *, pool_bytes: int
) -> EngineFactsView:
    """The facts of an engine for graph checks. `pool_bytes`: the memory that the pool really takes.
    Raises EngineOptionError.
    """
    facts, model = engine_facts(options, folder, sizing), folder.facts
    return EngineFactsView(
        model_hash=facts.model_hash,
        dtype=engine_dtype(options, model),
        quantization=options.quantization or "none",
        kv_cache_dtype=options.kv_cache_dtype,
        block_size=facts.block_size,
        num_kv_heads=model.num_kv_heads,
        head_dim=model.head_dim,
        num_layers=kv_blocks(options, model).block_layers,
        max_model_len=facts.max_model_len,
        kv_pool_bytes=pool_bytes,
        replicas=options.replicas,
        capabilities=facts.capabilities,
    )
