"""What a scheduler may do."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Limits:
    """What one step may hold, and whether prefixes are kept.

    `prefill_chunk` None: as many tokens of one prompt as fit.
    """

    max_num_seqs: int
    max_step_tokens: int
    prefill_chunk: int | None = None
    prefix_caching: bool = True

    @property
    def max_chunk(self) -> int:
        """Tokens of one sequence that a step computes at most."""
        return min(self.max_step_tokens, self.prefill_chunk or self.max_step_tokens)
