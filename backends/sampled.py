"""What one launch has sampled, as numbers of the host."""

from dataclasses import dataclass, field
from typing import NamedTuple


class Logprob(NamedTuple):
    """The log probability of a token, and the most likely ones, best first."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()
    rank: int | None = None  # 1: none is more likely; known of prompt tokens only


@dataclass(frozen=True, slots=True)
class Sampled:
    """The tokens of one launch, in the order of its rows; `logprobs` where any were asked for.

    `broken`: rows whose tokens mean nothing. In those that are `exhausted`, the sampling options
    forbid every token; in the others, the logits are not finite. `prompt_logprobs`: in the order of
    `StepBatch.scored`.
    """

    token_ids: list[int]
    logprobs: list[Logprob | None] | None = None
    broken: frozenset[int] = frozenset()
    exhausted: frozenset[int] = frozenset()
    prompt_logprobs: list[list[Logprob]] = field(default_factory=list)

    def logprobs_of(self, rows: range) -> list[Logprob]:
        """Those of some rows; none where none were asked for."""
        found = [self.logprobs[row] for row in rows] if self.logprobs else []
        return [logprob for logprob in found if logprob is not None]
