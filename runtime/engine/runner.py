"""What computes a batch: the protocol between the engine's loop and a device."""

from dataclasses import dataclass
from typing import Protocol

from sagellm.runtime.engine.scheduler import Batch
from sagellm.runtime.messages import TokenLogprob


@dataclass(frozen=True, slots=True)
class Drawn:
    """The tokens of one step, in the order of `Batch.drawing`; `logprobs` where any was asked."""

    token_ids: list[int]
    logprobs: list[TokenLogprob | None] | None = None


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
