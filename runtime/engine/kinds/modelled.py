"""The kind `modelled`: an engine that schedules and leases as `local` does, but computes nothing. A
cost model gives the time of each step.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import trio

from sagellm.backends import Sampled, get_backend
from sagellm.backends.null import null_tokens
from sagellm.graphs.vocabulary import KV_TRANSFER, RESUME, TOKENS_IN, TOKENS_OUT
from sagellm.runtime.engine.batch import Batch, rows_of
from sagellm.runtime.engine.kinds import EngineDescription, EngineKind, ReplicaPlace
from sagellm.runtime.engine.local_engine import LocalEngine
from sagellm.runtime.engine.options import PagedOptions
from sagellm.runtime.engine.runner import EngineResources, StepLaunch
from sagellm.runtime.engine.sizing import Sizing, engine_facts, facts_view, resized, size, sizes
from sagellm.runtime.engine.step_cost import StepCost, StepShape, step_shape
from sagellm.runtime.kv.transport import BlockLocation, BlockPairs, SharedBlocks, Storage
from sagellm.runtime.models.folder import ModelFolder, resolve_model
from sagellm.runtime.port import EngineFacts

_CAPABILITIES = frozenset({TOKENS_IN, TOKENS_OUT, KV_TRANSFER, RESUME})
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
    between pools, in bytes a second.
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
        """Always None: no weights are loaded."""

    @property
    def capabilities(self) -> frozenset[str]:
        return _CAPABILITIES


def modelled_facts(options: ModelledOptions) -> EngineFacts:
    """The facts of an engine with these options. Raises as `open_modelled` does."""
    folder = resolve_model(options.model)
    return engine_facts(options, folder, _size(options, folder))


def open_modelled(options: ModelledOptions, *, name: str, replica: int = 0) -> LocalEngine:
    """Open one replica, ready for `run`. Raises EngineOptionError, ModelError, UnsupportedModel."""
    facts = modelled_facts(options)
    vocab_size = resolve_model(options.model).facts.vocab_size
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
    cost: StepCost
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
    folder = resolve_model(options.model)
    sizing = _size(options, folder)
    view = facts_view(options, folder, sizing, pool_bytes=0)
    return EngineDescription(view, options.model, folder, folder.warnings, sizes(options, sizing))


KIND = EngineKind(ModelledOptions, _CAPABILITIES, _open, _describe)
