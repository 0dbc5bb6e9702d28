"""What computes a batch: the protocol between the engine's loop and a device."""

from dataclasses import dataclass, field
from typing import Protocol

from sagellm.runtime.engine.batch import Batch
from sagellm.runtime.messages import TokenLogprob


@dataclass(frozen=True, slots=True)
class Drawn:
    """The tokens of one step, in the order of `Batch.drawing`; `logprobs` where any was asked.

    `broken`: rows whose logits are no numbers; their tokens mean nothing. `prompt_logprobs`: in
    the order of `Batch.scoring`.
    """

    token_ids: list[int]
    logprobs: list[TokenLogprob | None] | None = None
    broken: frozenset[int] = frozenset()
    prompt_logprobs: list[list[TokenLogprob]] = field(default_factory=list)


class Runner(Protocol):
    """One device's way to compute batches, one at a time."""

    async def run(self, batch: Batch) -> Drawn:
        """Compute keys and values of the batch's tokens; draw where a sequence has none pending.

        Cancellation is delivered only once nothing writes the sequences' blocks any more.
        """
        ...

    async def open(self) -> None:
        """Start what `run` needs; `close` ends it, also when this was cancelled."""
        ...

    async def close(self) -> None:
        """Leave nothing running. Shielded from cancellation, and brief."""
        ...
