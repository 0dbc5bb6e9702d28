"""Stop strings: what of a growing text may be shown, and which of them ended it."""


class StopStrings:
    """Holds text back while it could be the beginning of a stop string; for one answer.

    `min_tokens`: tokens within which no stop string counts (as in vLLM). `keep_stop`: the stop
    string itself is shown.
    """

    def __init__(
        self, stop: tuple[str, ...] = (), *, min_tokens: int = 0, keep_stop: bool = False
    ) -> None:
        self._stop = stop
        self._min_tokens = min_tokens
        self._keep_stop = keep_stop
        self._num_tokens = 0
        self._held = ""

    def push(self, text: str, num_tokens: int = 1) -> tuple[str, str | None]:
        """Of so many more tokens, which are this text: the text that became showable, and the stop
        string that ended the answer, if any.
        """
        self._num_tokens += num_tokens
        text = self._held + text
        if not self._stop or self._num_tokens <= self._min_tokens:
            self._held = ""
            return text, None
        return self._match(text)

    def finish(self, text: str = "") -> tuple[str, str | None]:
        """What was held back until now, and this text: the answer is over."""
        text, self._held = self._held + text, ""
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
