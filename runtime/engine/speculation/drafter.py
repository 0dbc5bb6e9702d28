"""What guesses the next tokens of sequences: the protocol between the engine and its drafters."""

from collections.abc import Mapping
from typing import Protocol

from sagellm.runtime.engine.sequence import Sequence


class Drafter(Protocol):
    """Keeps what it needs of each sequence, by identity, until told to forget it."""

    async def draft(self, wanted: Mapping[Sequence, int]) -> dict[Sequence, list[int]]:
        """Up to so many next tokens of each; none of those that it knows nothing for.

        `Sequence.tokens` may have grown since the last call, never changed.
        """
        ...

    @property
    def token_s(self) -> float:
        """Seconds that one draft token took lately."""
        ...

    def forget(self, sequence: Sequence) -> None:
        """The sequence has left the engine; one that was never seen is ignored."""
        ...

    def clear(self) -> None:
        """Forget all."""
        ...
