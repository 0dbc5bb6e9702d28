"""The runner that computes nothing and takes the time it is told."""

from dataclasses import dataclass

import trio

from sagellm.runtime.engine.batch import Batch
from sagellm.runtime.engine.runner import Drawn

_MASK = (1 << 64) - 1


def null_token(seed: int, choice: int, position: int, vocab_size: int) -> int:
    """A token that depends on (seed, choice, position) alone: splitmix64's mixing steps."""
    mixed = (seed * 0x9E3779B97F4A7C15 + choice * 0xD1B54A32D192ED03 + position + 1) & _MASK
    mixed = ((mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    mixed = ((mixed ^ (mixed >> 27)) * 0x94D049BB133111EB) & _MASK
    return (mixed ^ (mixed >> 31)) % vocab_size


@dataclass(frozen=True, slots=True)
class NullRunner:
    """Sleeps `prefill_token_s` a prompt token and `decode_step_s` a step, on trio's clock; when
    half of that is over, half of the `num_layers` are done.
    """

    vocab_size: int
    prefill_token_s: float
    decode_step_s: float
    num_layers: int = 1

    async def run(self, batch: Batch) -> Drawn:
        num_decodes = batch.query_lens.count(1)
        num_prefill_tokens = batch.num_tokens - num_decodes
        step_s = self.decode_step_s + num_prefill_tokens * self.prefill_token_s
        if batch.layers_done is not None:
            await trio.sleep(step_s / 2)
            batch.layers_done.tell(self.num_layers // 2)
            step_s /= 2
        await trio.sleep(step_s)
        token_ids = [
            null_token(
                sequence.state.sampling.seed or 0,
                sequence.state.choice,
                len(sequence.tokens) - sequence.num_prompt,
                self.vocab_size,
            )
            for sequence in batch.drawing
        ]
        return Drawn(token_ids, prompt_logprobs=[[] for _ in batch.scoring])

    async def open(self) -> None:
        await trio.lowlevel.checkpoint()

    async def close(self) -> None:
        """Nothing runs."""
