"""Tokens to text while they come: whole characters only, and in sum what `decode` gives."""

from collections.abc import Callable

# What decoders put where bytes are no character yet. A text that ends so is held back until the
# next token shows whether the character is completed or wrong.
_BROKEN = "�"


class IncrementalDetokenizer:
    """Decodes a short window of tokens: those of the last text shown, and those behind it.

    The window keeps what a decoder derives from neighbours (a leading space, a character in
    several tokens) right without decoding the whole answer at each step; after vLLM and
    text-generation-inference. `decode` gives the text of a list of tokens.
    """

    def __init__(self, decode: Callable[[list[int]], str]) -> None:
        self._decode = decode
        self._window: list[int] = []
        self._num_shown = 0  # tokens of the window whose text was given out
        self._shown = ""  # their text

    def push(self, token_id: int) -> str:
        """The characters that became whole with this token."""
        self._window.append(token_id)
        text = self._decode(self._window)
        if text.endswith(_BROKEN) or len(text) <= len(self._shown):
            return ""
        return self._advance(text)

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
