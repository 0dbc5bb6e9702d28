"""The output of an engine: the text of answers, stop strings, and mailboxes of events."""

from collections import deque
from collections.abc import Callable
from collections.abc import Sequence as Items
from typing import Protocol

import trio

from sagellm.runtime.port import EngineEvent


class Detokenizer(Protocol):
    """Turns tokens into text, and holds back incomplete characters."""

    def push(self, token_id: int) -> str: ...

    def flush(self) -> str: ...


class OutputText:
    """The output text of one sequence: detokenises tokens, and finds stop strings.

    `min_tokens` and `keep_stop`: see `StopStrings`.
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
        self._stops = StopStrings(stop, min_tokens=min_tokens, keep_stop=keep_stop)

    def push(self, token_id: int) -> tuple[str, str | None]:
        """Take a token. Return the text that may be shown now, and the stop string that ended the
        text, or None.
        """
        return self._stops.push(self._detokenizer.push(token_id))

    def replay(self, token_ids: Items[int]) -> None:
        """Take tokens whose text was already shown, when a sequence resumes."""
        for token_id in token_ids:
            self.push(token_id)

    def finish(self) -> tuple[str, str | None]:
        """Return the text held back until now, and the stop string in it, or None. No token may
        follow.
        """
        return self._stops.finish(self._detokenizer.flush())


class StopStrings:
    """Finds stop strings in the text of one answer. Text that may be the beginning of a stop string
    is held back.

    `min_tokens`: stop strings in the first `min_tokens` tokens do not count, as in vLLM.
    `keep_stop`: show the stop string itself.
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
        """Take the text of `num_tokens` more tokens. Return the text that may be shown now, and the
        stop string that ended the answer, or None.
        """
        self._num_tokens += num_tokens
        text = self._held + text
        if not self._stop or self._num_tokens <= self._min_tokens:
            self._held = ""
            return text, None
        return self._match(text)

    def finish(self, text: str = "") -> tuple[str, str | None]:
        """Take the last `text` of the answer. Return the rest of the text to show, and the stop
        string that ended the text, or None.
        """
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
    """Length of the longest suffix of `text` that is a proper prefix of `stop`."""
    longest = min(len(text), len(stop) - 1)
    return next((size for size in range(longest, 0, -1) if text.endswith(stop[:size])), 0)


# Decoders write this character for bytes that are not a whole character. A text that ends with it
# is held back until the next token completes the character, or shows that it is broken.
_BROKEN = "\N{REPLACEMENT CHARACTER}"
_CHARACTER_BYTES = 4  # at most, in UTF-8; a token that has text has at least one byte
_NUM_HELD = 4 * _CHARACTER_BYTES  # tokens that may wait for a character to become whole


class IncrementalDetokenizer:
    """Turns tokens into text one token at a time. It returns whole characters only, which add up to
    the text that `decode` gives for all tokens.

    As in vLLM and text-generation-inference, each step decodes a short window, not the whole
    answer: the tokens of the last text shown, and the tokens after them. A decoder needs such
    neighbours: for a leading space, or a character in several tokens. Tokens without text are not
    kept in the window, and broken bytes leave it, so the window stays short.
    """

    def __init__(self, decode: Callable[[list[int]], str]) -> None:
        self._decode = decode
        self._window: list[int] = []
        self._num_shown = 0  # tokens of the window whose text was shown
        self._shown = ""  # the text of those tokens

    def push(self, token_id: int) -> str:
        """Take a token. Return the characters that are whole now."""
        self._window.append(token_id)
        text = self._decode(self._window)
        if not text.endswith(_BROKEN) and len(text) > len(self._shown):
            return self._advance(text)
        if not self._decode([token_id, token_id]):  # twice: one leading space may be stripped
            self._window.pop()
        return self._release() if len(self._window) - self._num_shown > _NUM_HELD else ""

    def flush(self) -> str:
        """Return the text held back, broken characters included. No token may follow."""
        text = self._decode(self._window)
        return self._advance(text) if len(text) > len(self._shown) else ""

    def _advance(self, text: str) -> str:
        fresh = text[len(self._shown) :]
        del self._window[: self._num_shown]
        self._num_shown = len(self._window)
        self._shown = self._decode(self._window)
        return fresh

    def _release(self) -> str:
        """Return all text before the last character: no further byte can change it."""
        # Cut where the text is shortest. If a run of bytes begins or ends inside a character, byte
        # fallback shows each of its bytes as a broken character, even those of whole characters.
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


# Batches that may wait. One batch is read while the next step computes, and two more absorb the
# jitter of the reader. More would only let an engine outrun a slow reader.
MAX_BATCHES = 4


class Mailbox:
    """The events of one owner. The engine calls `post` and `flush`; one reader iterates.

    A mailbox never blocks the engine. While it `is_full`, the scheduler skips the owner's
    sequences, so a slow reader delays only its own sequences. Events posted outside a step, such as
    of a cancelled sequence, may exceed the bound by one event for each sequence. `on_read` is
    called when a full mailbox has room again.
    """

    def __init__(self, on_read: Callable[[], None]) -> None:
        self._on_read = on_read
        self._posted: list[EngineEvent] = []
        self._batches: deque[tuple[EngineEvent, ...]] = deque()
        self.is_full = False
        self._filled = trio.Event()
        self._is_closed = False

    @property
    def num_free(self) -> int:
        """Batches that still fit."""
        return max(0, MAX_BATCHES - len(self._batches))

    def post(self, event: EngineEvent) -> None:
        self._posted.append(event)

    def flush(self) -> None:
        """Make the posted events one batch, if there are any."""
        if self._posted:
            self._batches.append(tuple(self._posted))
            self._posted.clear()
            self.is_full = len(self._batches) >= MAX_BATCHES
            self._filled.set()

    def close(self) -> None:
        """End the iteration after the batches that are not read yet."""
        self.flush()
        self._is_closed = True
        self._filled.set()

    def __aiter__(self) -> "Mailbox":
        return self

    async def __anext__(self) -> tuple[EngineEvent, ...]:
        await trio.lowlevel.checkpoint()
        while not self._batches:
            if self._is_closed:
                raise StopAsyncIteration
            self._filled = trio.Event()
            await self._filled.wait()
        was_full = self.is_full
        batch = self._batches.popleft()
        self.is_full = len(self._batches) >= MAX_BATCHES
        if was_full:
            self._on_read()
        return batch
