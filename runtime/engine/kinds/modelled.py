"""The kind `modelled`: it schedules and leases as `local` does, computes nothing, and takes the
time of a cost model.
"""

from dataclasses import dataclass, field

import trio

from sagellm.backends import get_backend
from sagellm.graphs.vocabulary import KV_TRANSFER, RESUME, TOKENS_IN, TOKENS_OUT
from sagellm.runtime.engine.kinds.kind import Described, EngineKind, Place
from sagellm.runtime.engine.kinds.paged import facts_view, resized, sizes
from sagellm.runtime.engine.local import LocalEngine
from sagellm.runtime.engine.modelled.cost import StepCost
from sagellm.runtime.engine.modelled.runner import ModelledRunner
from sagellm.runtime.engine.modelled.storage import ModelledStorage
from sagellm.runtime.engine.options import PagedOptions
from sagellm.runtime.engine.resources import EngineResources
from sagellm.runtime.engine.sizing import Sizing, engine_facts, size
from sagellm.runtime.models.folder import ModelFolder, resolve_model

_CAPABILITIES = frozenset({TOKENS_IN, TOKENS_OUT, KV_TRANSFER, RESUME})
_BACKEND = "null"  # its devices have memory for any pool


def _cost(default: float) -> float:
    value: float = field(default=default, metadata={"min": 0})
    return value


@dataclass(frozen=True, slots=True)
class ModelledOptions(PagedOptions):
    """The options of kind `modelled`: the coefficients of `StepCost`, in seconds.

    `decode_step_s`: of a step, whatever it computes. `prefill_token_s`: of a prompt token that is
    computed. `prefill_pair_s`: of a pair of such a token and a token that it attends to.
    `decode_row_s`: of a sequence that decodes. `context_token_s`: of a token in the context of a
    sequence of the step. `kv_bytes_per_s`: bytes a second between pools.
    """

    prefill_token_s: float = _cost(1e-4)
    decode_step_s: float = _cost(0.01)
    prefill_pair_s: float = _cost(0.0)
    decode_row_s: float = _cost(0.0)
    context_token_s: float = _cost(0.0)
    kv_bytes_per_s: float = field(default=10e9, metadata={"min": 1})

    @property
    def cost(self) -> StepCost:
        return StepCost(
            self.decode_step_s,
            self.prefill_token_s,
            self.prefill_pair_s,
            self.decode_row_s,
            self.context_token_s,
        )

    @property
    def quantization(self) -> None:
        """Weights are not loaded; their form is that of the folder."""

    @property
    def capabilities(self) -> frozenset[str]:
        return _CAPABILITIES


def open_modelled(options: ModelledOptions, *, name: str, replica: int = 0) -> LocalEngine:
    """One replica, ready for `run`. Raises EngineOptionError, ModelError, UnsupportedModel."""
    folder = resolve_model(options.model)
    facts = engine_facts(options, folder, _size(options, folder))
    vocab_size = folder.facts.vocab_size
    resources = EngineResources(
        facts,
        options.limits,
        ModelledRunner(vocab_size, options.cost),
        ModelledStorage(facts.kv_block_bytes, options.kv_bytes_per_s),
        vocab_size,
    )
    return LocalEngine(resources, name=name, replica=replica)


def _size(options: ModelledOptions, folder: ModelFolder) -> Sizing:
    return size(options, folder.facts, get_backend(_BACKEND).device().memory_bytes)


async def _open(options: ModelledOptions, place: Place) -> LocalEngine:
    await trio.lowlevel.checkpoint()
    sized = resized(options, place.num_blocks)
    return open_modelled(sized, name=place.engine, replica=place.replica)


def _describe(options: ModelledOptions) -> Described:
    folder = resolve_model(options.model)
    sizing = _size(options, folder)
    view = facts_view(options, folder, sizing, pool_bytes=0)
    return Described(view, options.model, folder, folder.warnings, sizes(options, sizing))


KIND = EngineKind(ModelledOptions, _CAPABILITIES, _open, _describe)
