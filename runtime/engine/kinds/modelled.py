"""The kind `modelled`: an engine that schedules and leases as `local` does, but computes nothing. A
cost model gives the time of each step.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import lru_cache

import trio

from sagellm.backends import Sampled, get_backend
from sagellm.backends.null import null_tokens
from sagellm.graphs.vocabulary import KV_TRANSFER, RESUME, TOKENS_IN, TOKENS_OUT
from sagellm.runtime.engine.batch import Batch, rows_of
from sagellm.runtime.engine.costs.parallel import Parallelism
from sagellm.runtime.engine.costs.profile import (
    CostedModel,
    HostCost,
    Profile,
    ProfileError,
    cost_of,
    profile_file,
    read_profile,
)
from sagellm.runtime.engine.costs.spread import StepSpread
from sagellm.runtime.engine.kinds import EngineDescription, EngineKind, ReplicaPlace
from sagellm.runtime.engine.local_engine import LocalEngine
from sagellm.runtime.engine.options import EngineOptionError, PagedOptions
from sagellm.runtime.engine.runner import EngineResources, StepLaunch
from sagellm.runtime.engine.sizing import (
    Sizing,
    engine_dtype,
    engine_facts,
    facts_view,
    kv_blocks,
    resized,
    size,
    sizes,
)
from sagellm.runtime.engine.step_cost import CostModel, StepCost, StepShape, step_shape
from sagellm.runtime.kv.transport import BlockLocation, BlockPairs, SharedBlocks, Storage
from sagellm.runtime.models.folder import ModelFolder
from sagellm.runtime.models.shapes import resolve_shape
from sagellm.runtime.port import EngineFacts

_CAPABILITIES = frozenset({TOKENS_IN, TOKENS_OUT, KV_TRANSFER, RESUME})
_COSTS = (
    "prefill_token_s",
    "decode_step_s",
    "prefill_pair_s",
    "decode_row_s",
    "context_token_s",
)
_GROUP = ("tensor_parallel_size", "pipeline_parallel_size", "expert_parallel_size")
_BACKEND = "null"  # its devices have memory for any pool


def _cost(default: float) -> float:
    value: float = field(default=default, metadata={"min": 0})
    return value


@dataclass(frozen=True, slots=True)
class ModelledOptions(PagedOptions):
    """The options of kind `modelled`. All costs are in seconds.

    `decode_step_s`: the fixed cost of a step. `prefill_token_s`: the cost of each computed prompt
    token. `prefill_pair_s`: the cost of each pair of a computed prompt token and a token that it
    attends to. `decode_row_s`: the cost of each sequence that decodes. `context_token_s`: the cost
    of each token in the contexts of the step's sequences. `kv_bytes_per_s`: the speed of copies
    between pools, in bytes a second. `profile`: a shipped profile or a file, which gives the cost
    of steps instead. For a profile of a device: `tensor_parallel_size` devices split each layer,
    `pipeline_parallel_size` devices have consecutive layers, and `expert_parallel_size` devices
    have each a part of the experts and of the sequences. Raises EngineOptionError.
    """

    prefill_token_s: float = _cost(1e-4)
    decode_step_s: float = _cost(0.01)
    prefill_pair_s: float = _cost(0.0)
    decode_row_s: float = _cost(0.0)
    context_token_s: float = _cost(0.0)
    kv_bytes_per_s: float = field(default=10e9, metadata={"min": 1})

    profile: str | None = None
    tensor_parallel_size: int = field(default=1, metadata={"min": 1})
    pipeline_parallel_size: int = field(default=1, metadata={"min": 1})
    expert_parallel_size: int = field(default=1, metadata={"min": 1})

    def __post_init__(self) -> None:
        PagedOptions.__post_init__(self)
        if self.profile is None:
            for name in _GROUP:
                if getattr(self, name) > 1:
                    raise EngineOptionError(f"{name} needs a profile of a device")
            return
        for one in fields(self):
            if one.name in _COSTS and getattr(self, one.name) != one.default:
                raise EngineOptionError(
                    f"{one.name}: profile {self.profile} gives the cost of steps; give one of both"
                )

    @property
    def cost(self) -> CostModel:
        """Raises EngineOptionError, ModelError, UnsupportedModel."""
        if self.profile is not None:
            return _profiled(self, _changed_at(self.profile))[0]
        return StepCost(
            self.decode_step_s,
            self.prefill_token_s,
            self.prefill_pair_s,
            self.decode_row_s,
            self.context_token_s,
        )

    @property
    def spread(self) -> tuple[StepSpread, ...]:
        """How steps vary about their cost; empty: not at all. Raises as `cost` does."""
        if self.profile is None:
            return ()
        return _profiled(self, _changed_at(self.profile))[1].spread

    @property
    def host(self) -> HostCost | None:
        """The time outside of steps, which only simulations add: an engine that steps spends its
        own. None: none. Raises as `cost` does.
        """
        if self.profile is None:
            return None
        return _profiled(self, _changed_at(self.profile))[1].host

    @property
    def quantization(self) -> None:
        """Always None: no weights are loaded."""

    @property
    def capabilities(self) -> frozenset[str]:
        return _CAPABILITIES


def _changed_at(profile: str) -> int:
    """When the file of a profile was written, in nanoseconds. Raises EngineOptionError."""
    try:
        return profile_file(profile).stat().st_mtime_ns
    except (ProfileError, OSError) as error:
        raise EngineOptionError(str(error)) from None


@lru_cache(maxsize=64)
def _profiled(options: ModelledOptions, changed_at: int) -> tuple[CostModel, Profile]:
    """A profile, and the cost that it gives. Raises EngineOptionError, ModelError,
    UnsupportedModel.
    """
    assert options.profile is not None
    facts = modelled_folder(options).facts
    kv_bytes = kv_blocks(options, facts).block_bytes / options.block_size
    dtype = engine_dtype(options, facts)
    group = Parallelism(*(getattr(options, name) for name in _GROUP))
    model = CostedModel(options.model, facts, dtype, kv_bytes, group)
    try:
        folder, profile = profile_file(options.profile).parent, read_profile(options.profile)
        return cost_of(profile, model, folder), profile
    except ProfileError as error:
        raise EngineOptionError(str(error)) from None


def modelled_folder(options: ModelledOptions) -> ModelFolder:
    """The model of an engine with these options. One without files has any context limit.

    Raises ModelError, UnsupportedModel.
    """
    folder = resolve_shape(options.model)
    longest = max(folder.facts.max_model_len, options.max_model_len or 0)
    if folder.path is not None or longest == folder.facts.max_model_len:
        return folder
    return replace(folder, facts=replace(folder.facts, max_model_len=longest))


def modelled_facts(options: ModelledOptions) -> EngineFacts:
    """The facts of an engine with these options. Raises as `open_modelled` does."""
    folder = modelled_folder(options)
    return engine_facts(options, folder, _size(options, folder))


def open_modelled(options: ModelledOptions, *, name: str, replica: int = 0) -> LocalEngine:
    """Open one replica, ready for `run`. Raises EngineOptionError, ModelError, UnsupportedModel."""
    facts = modelled_facts(options)
    vocab_size = modelled_folder(options).facts.vocab_size
    resources = EngineResources(
        facts,
        options.limits,
        ModelledRunner(vocab_size, options.cost),
        ModelledStorage(facts.kv_block_bytes, options.kv_bytes_per_s),
        vocab_size,
    )
    return LocalEngine(resources, name=name, replica=replica)


@dataclass(frozen=True, slots=True)
class ModelledLaunch:
    """A launched batch, whose `seconds` begin when its result is awaited."""

    batch: Batch
    seconds: float
    vocab_size: int

    async def result(self) -> Sampled:
        await trio.sleep(self.seconds)
        token_ids = null_tokens(rows_of(self.batch), self.vocab_size)
        return Sampled(token_ids, prompt_logprobs=[[] for _ in self.batch.scoring])

    def cancel(self) -> bool:
        return False


@dataclass(frozen=True, slots=True)
class ModelledRunner:
    """Sleeps for the cost of each batch, on trio's clock. Token ids follow from the seed, the
    choice and the position.
    """

    vocab_size: int
    cost: CostModel
    async_scheduling: bool = False

    def launch(self, batch: Batch, after: StepLaunch | None = None) -> ModelledLaunch:
        return ModelledLaunch(batch, self.cost.seconds(shape_of(batch)), self.vocab_size)

    async def open(self) -> None:
        await trio.lowlevel.checkpoint()

    async def close(self) -> None:
        """Do nothing: no step runs by itself."""


def shape_of(batch: Batch) -> StepShape:
    """The shape that the cost of a batch depends on."""
    prompts = (sequence.num_prompt for sequence in batch.sequences)
    return step_shape(zip(batch.starts, batch.query_lens, prompts, strict=True))


@dataclass(frozen=True, slots=True)
class ModelledStorage:
    """Implements Storage without memory. A copy takes as long as a link of `bytes_per_s` bytes a
    second would take.
    """

    block_bytes: int
    bytes_per_s: float
    num_damaged: int = 0

    async def receive(self, sender: Storage, pairs: BlockPairs, check: Callable[[], None]) -> None:
        check()
        await trio.sleep(self._seconds(len(pairs)))

    async def share(self, blocks: Sequence[int], check: Callable[[], None]) -> BlockLocation:
        await trio.lowlevel.checkpoint()
        check()
        # A placeholder: no process reads memory of this pool.
        return SharedBlocks(pid=0, descriptor=-1, size=0, blocks=tuple(blocks))

    async def fetch(
        self, source: BlockLocation, blocks: Sequence[int], check: Callable[[], None]
    ) -> None:
        check()
        await trio.sleep(self._seconds(len(blocks)))

    def drop_stale(self) -> None:
        """Do nothing: no resources of other processes are held."""

    async def serve(self) -> None:
        await trio.sleep_forever()

    def _seconds(self, num_blocks: int) -> float:
        return num_blocks * self.block_bytes / self.bytes_per_s


def _size(options: ModelledOptions, folder: ModelFolder) -> Sizing:
    return size(options, folder.facts, get_backend(_BACKEND).device().memory_bytes)


async def _open(options: ModelledOptions, place: ReplicaPlace) -> LocalEngine:
    await trio.lowlevel.checkpoint()
    sized = resized(options, place.num_blocks)
    return open_modelled(sized, name=place.engine, replica=place.replica)


def _describe(options: ModelledOptions) -> EngineDescription:
    _ = options.cost  # a faulty profile is found before the engine is opened
    folder = modelled_folder(options)
    sizing = _size(options, folder)
    view = facts_view(options, folder, sizing, pool_bytes=0)
    return EngineDescription(view, options.model, folder, folder.warnings, sizes(options, sizing))


KIND = EngineKind(ModelledOptions, _CAPABILITIES, _open, _describe)
