"""How the events of one request leave the trio loop for a reader that is elsewhere."""

from collections.abc import Sequence
from typing import Protocol

import trio

from sagellm.gateway.door import Entry
from sagellm.gateway.door_session import closed, stream_of
from sagellm.gateway.failure import ApiError
from sagellm.gateway.settings import Streaming
from sagellm.prompts import RequestError
from sagellm.session import Output, Session
from sagellm.stream import Stream

_WINDOW = 4  # this part of what may wait unread waits at the reader, the rest in the stream


class Reader(Protocol):
    """Whoever asked, as the trio loop sees it."""

    crossing: "Crossing | None"  # set once its stream is there

    @property
    def num_taken(self) -> int:
        """Tokens that were read, as far as known here."""

    @property
    def is_left(self) -> bool:
        """Whether it wants no more."""

    def hold(self) -> None:
        """Something waits, for which there is no room; called again while that is so."""

    def is_excused(self) -> bool:
        """Whether something between here and whoever asked may be what does not read."""

    def send(self, outputs: Sequence[Output], end: ApiError | bool) -> None:
        """`end`: whether, or with which error, nothing comes after."""


class Crossing:
    """Sends a stream's events over as they come, while there is room.

    What finds no room stays in the stream, and counts against its limits.
    """

    def __init__(self, stream: Stream, to: Reader, window: int) -> None:
        self.stream = stream
        self.scope = trio.CancelScope()  # over when all was sent, or the reader has left
        self.is_held = False
        self.is_finished = False
        self._to = to
        self._window = window
        self._num_sent = 0  # tokens; written in the trio loop only
        stream.on_arrival = self.flush

    def flush(self) -> None:
        """Send what waits. While the window is full nothing is sent: reading calls this again."""
        if self._is_full:
            self.is_held = True
            if self._is_full:  # still: it may have been read before `is_held` could be seen
                self._to.hold()
                return
        self.is_held = False
        outputs, self.is_finished = self.stream.take_nowait(), self.stream.is_over
        self._num_sent += num_tokens(outputs)
        self._to.send(outputs, self.is_finished)
        if self.is_finished:
            self.scope.cancel()

    @property
    def _is_full(self) -> bool:
        return self._num_sent - self._to.num_taken >= self._window


async def carry(session: Session, streaming: Streaming, entry: Entry, to: Reader) -> None:
    """One request's task in the trio loop, which sleeps but for its start and its end."""
    window = window_of(streaming)
    tokens = streaming.num_buffered_tokens - window
    size = streaming.num_buffered_bytes - streaming.num_buffered_bytes // _WINDOW
    end = closed()
    try:
        stream = stream_of(session, entry, tokens, size)
        crossing = to.crossing = Crossing(stream, to, window)
        stream.is_excused = to.is_excused
        if to.is_left:
            return
        with crossing.scope:
            async with stream:
                await trio.sleep_forever()
    except ApiError as error:
        end = error
    except RequestError:
        end = closed()
    finally:
        if to.crossing is None or not to.crossing.is_finished:
            to.send((), end)


def window_of(streaming: Streaming) -> int:
    """The tokens that may be on their way to a reader, or wait there."""
    return max(1, streaming.num_buffered_tokens // _WINDOW)


def num_tokens(outputs: Sequence[Output]) -> int:
    return sum(output.num_tokens for output in outputs)
