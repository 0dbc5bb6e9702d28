"""The runner that computes nothing and takes the time it is told."""

from dataclasses import dataclass

import trio

from sagellm.backends import Sampled
from sagellm.backends.null.backend import null_tokens
from sagellm.runtime.engine.batch import Batch
from sagellm.runtime.engine.runner import Launch
from sagellm.runtime.engine.step_batch import rows_of


@dataclass(frozen=True, slots=True)
class NullLaunch:
    """Its step begins when somebody waits for the result."""

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
class NullRunner:
    """Sleeps `prefill_token_s` a prompt token and `decode_step_s` a step, on trio's clock."""

    vocab_size: int
    prefill_token_s: float
    decode_step_s: float
    runs_ahead: bool = False

    def launch(self, batch: Batch, after: Launch | None = None) -> NullLaunch:
        num_prompt_tokens = batch.num_tokens - batch.num_answer_tokens
        seconds = self.decode_step_s + num_prompt_tokens * self.prefill_token_s
        return NullLaunch(batch, seconds, self.vocab_size)

    async def open(self) -> None:
        await trio.lowlevel.checkpoint()

    async def close(self) -> None:
        """Nothing runs."""
