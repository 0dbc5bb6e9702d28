"""The text of one answer: what may be shown of it so far, and whether a stop string ended it."""

from collections.abc import Sequence as Items
from typing import Protocol

from sagellm.runtime.engine.stop_strings import StopStrings


class Detokenizer(Protocol):
    """Turns tokens into text, holding back what is not a whole character yet."""

    def push(self, token_id: int) -> str: ...

    def flush(self) -> str: ...


class Transcript:
    """Detokenises, and looks for stop strings: see `StopStrings`."""

    def __init__(
        self,
        detokenizer: Detokenizer,
        stop: tuple[str, ...] = (),
        *,
        min_tokens: int = 0,
        keep_stop: bool = False,
    ) -> None:
        self._detokenizer = detokenizer
        self._stops = StopStrings(stop, min_tokens=min_tokens, keep_stop=keep_stop)

    def push(self, token_id: int) -> tuple[str, str | None]:
        """The text that became showable, and the stop string that ended it, if any."""
        return self._stops.push(self._detokenizer.push(token_id))

    def replay(self, token_ids: Items[int]) -> None:
        """Reach the state behind tokens whose text was already shown."""
        for token_id in token_ids:
            self.push(token_id)

    def finish(self) -> tuple[str, str | None]:
        """What was held back until now: the answer is over."""
        return self._stops.finish(self._detokenizer.flush())
