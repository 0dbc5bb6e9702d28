"""The text of one answer: what may be shown of it so far, and whether a stop string ended it."""

from collections.abc import Sequence as Items
from typing import Protocol


class Detokenizer(Protocol):
    """Turns tokens into text, holding back what is not a whole character yet."""

    def push(self, token_id: int) -> str: ...

    def flush(self) -> str: ...


class Transcript:
    """Holds text back while it could be the beginning of a stop string.

    `min_tokens`: tokens within which no stop string counts (as in vLLM).
    """

    def __init__(
        self,
        detokenizer: Detokenizer,
        stop: tuple[str, ...] = (),
        *,
        min_tokens: int = 0,
        keep_stop: bool = False,
    ) -> None:
        self._detokenizer = detokenizer
        self._stop = stop
        self._min_tokens = min_tokens
        self._keep_stop = keep_stop
        self._num_tokens = 0
        self._held = ""

    def push(self, token_id: int) -> tuple[str, str | None]:
        """The text that became showable, and the stop string that ended it, if any."""
        self._num_tokens += 1
        text = self._held + self._detokenizer.push(token_id)
        if not self._stop or self._num_tokens <= self._min_tokens:
            self._held = ""
            return text, None
        return self._match(text)

    def replay(self, token_ids: Items[int]) -> None:
        """Reach the state behind tokens whose text was already shown."""
        for token_id in token_ids:
            self.push(token_id)

    def finish(self) -> tuple[str, str | None]:
        """What was held back until now: the answer is over."""
        text = self._held + self._detokenizer.flush()
        self._held = ""
        return self._match(text, is_last=True) if self._stop else (text, None)

    def _match(self, text: str, *, is_last: bool = False) -> tuple[str, str | None]:
        found = [(text.find(stop), stop) for stop in self._stop if stop in text]
        if found:
            start, stop = min(found)
            self._held = ""
            return text[: start + len(stop) * self._keep_stop], stop
        num_held = 0 if is_last else max(_overlap(text, stop) for stop in self._stop)
        shown = len(text) - num_held
        self._held = text[shown:]
        return text[:shown], None


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`."""
    longest = min(len(text), len(stop) - 1)
    return next((size for size in range(longest, 0, -1) if text.endswith(stop[:size])), 0)
