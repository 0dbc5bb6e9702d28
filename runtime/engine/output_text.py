"""The text of an answer: incremental detokenisation, and stop strings."""

from collections.abc import Callable
from collections.abc import Sequence as Items
from typing import Protocol


class Detokenizer(Protocol):
    """Turns tokens into text, holding back what is not a whole character yet."""

    def push(self, token_id: int) -> str: ...

    def flush(self) -> str: ...


class OutputText:
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


# What decoders put where bytes are no character yet. A text that ends so is held back until the
# next token shows whether the character is completed or wrong.
_BROKEN = "\N{REPLACEMENT CHARACTER}"
_CHARACTER_BYTES = 4  # of UTF-8, at most; a token that has any bytes at all has one or more
_NUM_HELD = 4 * _CHARACTER_BYTES  # tokens that may wait for a character to become whole


class IncrementalDetokenizer:
    """Decodes a short window of tokens: those of the last text shown, and those behind it.

    The window keeps what a decoder derives from neighbours (a leading space, a character in
    several tokens) right without decoding the whole answer at each step; after vLLM and
    text-generation-inference. `decode` gives the text of a list of tokens. Tokens without text
    never enter the window, and broken bytes leave it, so that it stays short whatever comes.
    """

    def __init__(self, decode: Callable[[list[int]], str]) -> None:
        self._decode = decode
        self._window: list[int] = []
        self._num_shown = 0  # tokens of the window whose text was given out
        self._shown = ""  # what the window decodes to, as far as it was given out

    def push(self, token_id: int) -> str:
        """The characters that became whole with this token."""
        self._window.append(token_id)
        text = self._decode(self._window)
        if not text.endswith(_BROKEN) and len(text) > len(self._shown):
            return self._advance(text)
        if not self._decode([token_id, token_id]):  # twice: one leading space may be stripped
            self._window.pop()
        return self._release() if len(self._window) - self._num_shown > _NUM_HELD else ""

    def flush(self) -> str:
        """What was held back, broken characters included: no token follows."""
        text = self._decode(self._window)
        return self._advance(text) if len(text) > len(self._shown) else ""

    def _advance(self, text: str) -> str:
        fresh = text[len(self._shown) :]
        del self._window[: self._num_shown]
        self._num_shown = len(self._window)
        self._shown = self._decode(self._window)
        return fresh

    def _release(self) -> str:
        """Give out what no further byte can change: all before the last character.

        Cut where the text is shortest: byte fallback shows a run of bytes that begins or ends
        inside a character as one broken character a byte, those of whole characters included.
        """
        num, size = len(self._window), _CHARACTER_BYTES
        end = min(range(num - size, num), key=lambda end: len(self._text(0, end)))
        starts = range(end - size, end - 2 * size, -1)
        start = min(starts, key=lambda start: len(self._text(start, end)))
        fresh = self._text(0, end)[len(self._shown) : -1]
        self._shown = self._text(start, end)[:-1]
        self._num_shown = 0
        del self._window[:start]
        return fresh

    def _text(self, start: int, end: int) -> str:
        return self._decode(self._window[start:end])
