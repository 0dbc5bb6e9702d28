"""What computes a batch: the protocol between the engine's loop and a device."""

from dataclasses import dataclass, field
from typing import Protocol

from sagellm.runtime.engine.batch import Batch
from sagellm.runtime.messages import TokenLogprob


@dataclass(frozen=True, slots=True)
class Drawn:
    """The tokens of one step, in the order of `Batch.rows`; `logprobs` where any was asked.

    `broken`: rows whose tokens mean nothing. In those that are `exhausted`, the sampling parameters
    forbid every token; in the others, the logits are no numbers. `prompt_logprobs`: in the order
    of `Batch.scoring`.
    """

    token_ids: list[int]
    logprobs: list[TokenLogprob | None] | None = None
    broken: frozenset[int] = frozenset()
    exhausted: frozenset[int] = frozenset()
    prompt_logprobs: list[list[TokenLogprob]] = field(default_factory=list)

    def logprobs_of(self, rows: range) -> tuple[TokenLogprob, ...]:
        """Those of some rows; none where none were asked for."""
        found = [self.logprobs[row] for row in rows] if self.logprobs else []
        return tuple(logprob for logprob in found if logprob is not None)


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


class Lookahead(Protocol):
    """The same device's way to begin a batch the moment the one before it has drawn its tokens."""

    def queue(self, batch: Batch) -> None:
        """Begin a batch now, or, where it is `behind` the one queued before, when that has drawn.

        It is the caller's to `run` all that were queued and not recalled, in that order. One that
        is behind another fails where that one failed.
        """
        ...

    def recall(self) -> bool:
        """Take back the batch behind the one that runs; False where it has begun, or none is."""
        ...
