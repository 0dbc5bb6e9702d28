"""What kinds with a paged KV pool share: a model's config says the size and facts of the pool."""

from dataclasses import replace
from typing import TypeVar

from sagellm.graphs.facts import EngineFactsView
from sagellm.runtime.engine.options import PagedOptions, SizedOptions
from sagellm.runtime.engine.sizing import Sizing, engine_dtype, engine_facts, kv_blocks
from sagellm.runtime.models.folder import ModelFolder

P = TypeVar("P", bound=PagedOptions)


def resized(options: P, num_blocks: int | None) -> P:
    """The options with a pool of so many blocks, unless that is None."""
    return (
        options if num_blocks is None else replace(options, num_blocks=num_blocks, kv_memory=None)
    )


def sizes(options: PagedOptions, sizing: Sizing) -> dict[str, int]:
    """Options that say the size of a pool that memory decides."""
    if options.num_blocks is not None or options.kv_memory is not None:
        return {}
    return {"num_blocks": sizing.num_blocks, "max_model_len": sizing.max_model_len}


def facts_view(
    options: SizedOptions, folder: ModelFolder, sizing: Sizing, *, pool_bytes: int
) -> EngineFactsView:
    """What the checks may know; `pool_bytes`: of real memory. Raises EngineOptionError."""
    facts, model = engine_facts(options, folder, sizing), folder.facts
    return EngineFactsView(
        model_hash=facts.model_hash,
        dtype=engine_dtype(options, model),
        quantization=options.quantization or "none",
        block_size=facts.block_size,
        num_kv_heads=model.num_kv_heads,
        head_dim=model.head_dim,
        num_layers=kv_blocks(options, model).block_layers,
        max_model_len=facts.max_model_len,
        kv_pool_bytes=pool_bytes,
        replicas=options.replicas,
        capabilities=facts.capabilities,
    )
