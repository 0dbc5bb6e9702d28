"""The runner of a modelled engine: it computes nothing, and takes the time of its cost model."""

from dataclasses import dataclass

import trio

from sagellm.backends import Sampled
from sagellm.backends.null.backend import null_tokens
from sagellm.runtime.engine.batch import Batch
from sagellm.runtime.engine.modelled.cost import StepCost, StepShape, step_shape
from sagellm.runtime.engine.runner import Launch
from sagellm.runtime.engine.step_batch import rows_of


@dataclass(frozen=True, slots=True)
class ModelledLaunch:
    """The step begins when somebody waits for the result."""

    batch: Batch
    seconds: float
    vocab_size: int

    async def result(self) -> Sampled:
        await trio.sleep(self.seconds)
        token_ids = null_tokens(rows_of(self.batch), self.vocab_size)
        return Sampled(token_ids, prompt_logprobs=[[] for _ in self.batch.scoring])

    def recall(self) -> bool:
        return False


@dataclass(frozen=True, slots=True)
class ModelledRunner:
    """Sleeps for the cost of each batch, on trio's clock. Token ids follow from seed, choice and
    position.
    """

    vocab_size: int
    cost: StepCost
    runs_ahead: bool = False

    def launch(self, batch: Batch, after: Launch | None = None) -> ModelledLaunch:
        return ModelledLaunch(batch, self.cost.seconds(shape_of(batch)), self.vocab_size)

    async def open(self) -> None:
        await trio.lowlevel.checkpoint()

    async def close(self) -> None:
        """Nothing runs."""


def shape_of(batch: Batch) -> StepShape:
    """What the cost of a batch depends on."""
    prompts = (sequence.num_prompt for sequence in batch.sequences)
    return step_shape(zip(batch.starts, batch.query_lens, prompts, strict=True))
