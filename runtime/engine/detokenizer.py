"""Tokens to text while they come: whole characters only, and in sum what `decode` gives."""

from collections.abc import Callable

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
